"""SOMF's masks against plain torch, its export, and its laws."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from transformers import AutoModelForCausalLM

from callbacks import HFExport
from datamodules import SyntheticAlignment
from lightning_modules.somf import SOMFModule
from temper.data import PoolSource
from temper.errors import TemperError
from temper.models import LoRASpec, NetworkSpec
from temper.synthetic import Kind
from temper.synthetic.prompts import draw_prompts
from tests.edit.models import DATA, folder_tensors, same_bytes, save_model
from tests.objectives import exact_network, fit


class Pairs(SyntheticAlignment):
    """Six pairs of refusal and answer, of unequal length."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        unsafe = draw_prompts(self.language, Kind.UNSAFE, 6, "alignment", self.rng("alignment"))
        self.sources = {"pairs": PoolSource(self.pairs(unsafe, comply_first=False), 4, 0, "pairs")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_model(root / "safe", 1)
    save_model(root / "task", 2)
    return root


def make(folders: Path, double: bool = False, **settings: Any) -> Any:
    """A module on the two folders, or on two GPT-2 in float64."""
    settings.setdefault("optimizer", partial(torch.optim.SGD, lr=1.0))
    module = SOMFModule(NetworkSpec(path=str(folders / "task")), str(folders / "safe"), **settings)
    if double:
        task, safe = exact_pair()
        module.network = task
        module.safe_network = lambda: safe
    return module


def exact_pair() -> tuple[Any, Any]:
    safe = exact_network(len(Pairs(**DATA).tokenizer))
    task = copy.deepcopy(safe)
    torch.manual_seed(9)
    for parameter in task.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return task, safe


def fused(
    safe: dict, task: dict, masks: dict[str, torch.Tensor], w: float
) -> dict[str, torch.Tensor]:
    return {
        n: safe[n] + w * masks[n] * (task[n] - safe[n]) / (masks[n].sum() / masks[n].numel())
        for n in masks
    }


def logp(
    network: Any, weights: dict, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Sum of the label tokens' log-probabilities, one sequence and one token at a time."""
    size = int(mask.sum())
    logps = (
        torch.func.functional_call(network, weights, kwargs={"input_ids": ids[None, :size]})
        .logits[0]
        .log_softmax(-1)
    )
    return sum(logps[t - 1, labels[t]] for t in range(1, size) if labels[t] != -100)


@pytest.mark.parametrize("micro", [None, 1, 3])
def test_a_step_on_the_logits_is_that_of_plain_torch(folders, micro):
    module = make(folders, double=True, w=0.4, beta=0.3, max_grad_norm=None, micro_batch_size=micro)
    drawn = []
    module.on_train_start = lambda: drawn.append(
        {f: f.sample(m.parametrizations[o].original.detach()) for m, o, f in module.sites}
    )
    bake = module.bake
    module.bake = lambda: None
    data = Pairs(**DATA)
    fit(module, data, 1)
    found = {
        name: p.detach().clone() for name, p in module.network.named_parameters() if p.requires_grad
    }
    bake()
    baked = {name: p.detach() for name, p in module.network.named_parameters()}

    task, safe = exact_pair()
    task = {n: p.detach() for n, p in task.named_parameters()}
    safe_w = {n: p.detach() for n, p in safe.named_parameters()}
    of_name = _by_name(task, drawn[0])
    logits = {n: torch.zeros_like(p, requires_grad=True) for n, p in safe_w.items()}
    masks = {}
    for name in logits:
        # z = 0 at the start, so the sample is sigmoid(logit(u) / T): its noise is logit(sample) *
        # T.
        noise = torch.logit(of_name[name]) * 0.5
        masks[name] = 1 / (1 + torch.exp(-(logits[name] + noise) / 0.5))
    policy = fused(safe_w, task, masks, 0.4)
    reference = {n: safe_w[n] + 0.4 * (task[n] - safe_w[n]) for n in safe_w}
    rows = data.sources["pairs"].batch(0)
    loss = 0.0
    for ids, mask, labels in zip(
        rows["input_ids"], rows["attention_mask"], rows["labels"], strict=True
    ):
        ratio = [
            logp(safe, policy, ids[s], mask[s], labels[s])
            - logp(safe, reference, ids[s], mask[s], labels[s])
            for s in (0, 1)
        ]
        loss = loss - torch.nn.functional.logsigmoid(0.3 * (ratio[0] - ratio[1])) / len(rows["ids"])
    gradient = dict(zip(logits, torch.autograd.grad(loss, list(logits.values())), strict=True))
    assert len(found) == len(gradient)
    scale = torch.stack([g.abs().max() for g in gradient.values()]).max()
    for name, g in gradient.items():
        ours = next(p for n, p in found.items() if _plain_name(n) == name)
        assert (ours + g).abs().max() < 1e-10 * scale, (
            name  # SGD with rate 1 from 0: the logits are minus the gradient
        )
    final = fused(safe_w, task, {n: torch.sigmoid(-g) for n, g in gradient.items()}, 0.4)
    assert baked.keys() == final.keys()
    for name in final:
        torch.testing.assert_close(baked[name], final[name], rtol=1e-9, atol=1e-12)


def _plain_name(name: str) -> str:
    return name.replace("parametrizations.", "").removesuffix(".original")


def _by_name(task: dict, drawn: dict) -> dict[str, torch.Tensor]:
    """Masks by the name of their weight: fusions are numbered in the order of the parameters."""
    by_number = {fusion.seed[1]: mask for fusion, mask in drawn.items()}
    return {name: by_number[number] for number, name in enumerate(task)}


def test_the_export_is_an_ordinary_model_with_the_fused_weights(folders, tmp_path):
    module = make(folders, w=0.3, optimizer=partial(torch.optim.SGD, lr=50.0))
    logits = {}

    class Keep(L.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            logits.update(
                {
                    _plain_name(n): p.detach().clone()
                    for n, p in pl_module.network.named_parameters()
                    if p.requires_grad
                }
            )

    fit(module, Pairs(**DATA), 2, callbacks=[HFExport(), Keep()], default_root_dir=tmp_path)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    safe = folder_tensors(folders / "safe")
    task = folder_tensors(folders / "task")
    assert max(z.abs().max() for z in logits.values()) > 1e-3, "the logits have moved"
    expected = {**safe, **fused(safe, task, {n: torch.sigmoid(z) for n, z in logits.items()}, 0.3)}
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
    assert same_bytes(folder_tensors(tmp_path / "export"), dict(network.state_dict()))
    assert not any("parametrizations" in name for name in module.network.state_dict())


def test_only_the_logits_learn_and_equal_weights_have_none(folders):
    module = make(folders, double=False)
    seen = {}
    module.on_train_start = lambda: seen.update(
        {n: p.requires_grad for n, p in module.named_parameters()}
    )
    fit(module, Pairs(**DATA), 1)
    assert {n for n, learns in seen.items() if learns} == {
        n for n in seen if n.endswith(".original")
    }
    assert {n for n, learns in seen.items() if not learns} == {
        n for n in seen if "norm" in n
    }  # ones in both models


def test_w_zero_is_the_safe_model_bit_for_bit(folders):
    module = make(folders, w=0.0)
    fit(module, Pairs(**DATA), 2)
    assert same_bytes(dict(module.network.state_dict()), folder_tensors(folders / "safe"))


def test_answers_use_the_even_mask_before_training(folders):
    module = make(folders, w=0.5)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=1,
    )
    trainer.validate(module, Pairs(**DATA), verbose=False)
    safe = folder_tensors(folders / "safe")
    task = folder_tensors(folders / "task")
    head = module.network.eval().lm_head.weight
    torch.testing.assert_close(
        head, safe["lm_head.weight"] + 0.5 * (task["lm_head.weight"] - safe["lm_head.weight"])
    )


def test_samples_depend_on_step_weight_and_seed_alone(folders):
    def samples(seed: int) -> list[torch.Tensor]:
        module = make(folders, mask_seed=seed)
        drawn = []

        class Draw(L.Callback):
            def on_train_batch_end(self, *_: Any) -> None:
                chosen = module.sites[1:3]
                drawn.append([fusion.sample(torch.zeros(4, 4)) for _, _, fusion in chosen])

        fit(module, Pairs(**DATA), 2, callbacks=[Draw()])
        return [mask for step in drawn for mask in step]

    first = samples(0)
    again = samples(0)
    other = samples(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    everything = first + other
    assert not any(torch.equal(a, b) for i, a in enumerate(everything) for b in everything[:i])


def test_resuming_equals_never_having_stopped(folders, tmp_path):
    settings = {"optimizer": partial(torch.optim.AdamW, lr=0.1)}
    whole, first, second = (make(folders, **settings) for _ in range(3))
    fit(whole, Pairs(**DATA), 4)

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    stopped = fit(first, Pairs(**DATA), 3, callbacks=[Save()])
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=4,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(
        second, datamodule=Pairs(**DATA), ckpt_path=tmp_path / "run.ckpt", weights_only=True
    )
    assert same_bytes(dict(second.network.state_dict()), dict(whole.network.state_dict()))
    with pytest.raises(RuntimeError, match="masks are fused into the weights"):
        stopped.save_checkpoint(tmp_path / "late.ckpt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"w": -0.1}, "model.init_args.w=-0.1"),
        ({"temperature": 0.0}, "model.init_args.temperature=0.0"),
        ({"safe": "nowhere"}, "model.init_args.safe=nowhere: no such folder"),
    ],
)
def test_bad_arguments_are_refused_by_name(folders, settings, message):
    with pytest.raises(TemperError, match=message):
        SOMFModule(
            NetworkSpec(path=str(folders / "task")), **({"safe": str(folders / "safe")} | settings)
        )


def test_networks_that_cannot_be_masked_are_refused(folders, tmp_path):
    path = str(folders / "task")
    safe = str(folders / "safe")
    for spec in (NetworkSpec(path=path, lora=LoRASpec()), NetworkSpec(path=path, dtype="bfloat16")):
        with pytest.raises(TemperError, match="drop lora, set dtype=float32"):
            SOMFModule(spec, safe)
    with pytest.raises(TemperError, match="the same weights as network.path"):
        fit(SOMFModule(NetworkSpec(path=path), path), Pairs(**DATA), 1)
    other = str(save_model(tmp_path / "other", 1, hidden_size=32))
    with pytest.raises(
        TemperError,
        match=(
            r"model.init_args.safe=.*not the network of network.path, first at"
            r" model.embed_tokens.weight"
        ),
    ):
        fit(SOMFModule(NetworkSpec(path=path), other), Pairs(**DATA), 1)
