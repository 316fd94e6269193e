"""RMU against a separate float64 computation, what it trains, and where it steers."""

import copy
import functools
from functools import partial
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from datamodules.synthetic_unlearning import SyntheticUnlearning
from lightning_modules.rmu import RMUModule
from temper.errors import TemperError
from temper.models import LoRASpec, NetworkSpec, ShapeSpec, build_network
from tests.objectives import fit, make_module, relative_error

C = 3.0
ALPHA = 1.5


def unlearning_data(**changes: Any) -> SyntheticUnlearning:
    sizes = {
        "preset": "tiny",
        "n_forget": 8,
        "n_retain": 8,
        "batch_size": 8,
        "retain_batch_size": 6,
        "n_eval": 4,
        "seed": 1,
    }
    return SyntheticUnlearning(**(sizes | changes))


@functools.cache
def vocabulary() -> SyntheticUnlearning:
    return unlearning_data()


def rmu(**settings: Any) -> RMUModule:
    defaults = {
        "layer": 0,
        "steering_coefficient": C,
        "alpha": ALPHA,
        "max_grad_norm": None,
        "optimizer": partial(torch.optim.SGD, lr=0.01),
    }
    return make_module(RMUModule, vocabulary(), **(defaults | settings))


def llama(lora: bool = False, **settings: Any) -> RMUModule:
    """Three layers in float32, of which one is steered."""
    shape = ShapeSpec(hidden_size=16, n_layers=3, n_heads=2, intermediate_size=32, seed=3)
    spec = NetworkSpec(shape=shape, lora=LoRASpec(rank=2, alpha=4) if lora else None)
    module = RMUModule(
        spec, **({"layer": 1, "optimizer": partial(torch.optim.AdamW, lr=0.01)} | settings)
    )
    module.network = build_network(spec, vocabulary().tokenizer)
    return module


def hidden(network: Any, ids: torch.Tensor, mask: torch.Tensor, layer: int) -> torch.Tensor:
    """Output of a decoder layer, taken by a hook, at positions that are no padding."""
    seen: list[torch.Tensor] = []
    handle = network.transformer.h[layer].register_forward_hook(
        lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    network(input_ids=ids[None, : int(mask.sum())])
    handle.remove()
    return seen[0].reshape(int(mask.sum()), -1)


def mean_of(rows: list[torch.Tensor], labels: list[torch.Tensor], averages: dict) -> torch.Tensor:
    """Mean of values by row and position, as the arguments of `RMUModule` say."""
    if averages.get("tokens") == "answer":
        rows = [row[label[: len(row)] != -100] for row, label in zip(rows, labels, strict=True)]
    if averages.get("average") == "rows":
        return torch.stack([row.mean() for row in rows]).mean()
    return torch.cat(rows).mean()


def plain_loss(
    network: Any, reference: Any, forget: Any, retain: Any, seed: int, layer: int, **averages: str
) -> torch.Tensor:
    u = torch.rand(16, generator=torch.Generator().manual_seed(seed))
    target = (C * u / u.norm()).double()
    parts = []
    for row in range(len(forget["ids"])):
        h = hidden(network, forget["input_ids"][row, 0], forget["attention_mask"][row, 0], layer)
        parts.append(((h - target) ** 2).sum(-1))
    kept = []
    for row in range(len(retain["ids"])):
        pair = [
            hidden(n, retain["input_ids"][row], retain["attention_mask"][row], layer)
            for n in (network, reference)
        ]
        kept.append(((pair[0] - pair[1].detach()) ** 2).sum(-1))
    return mean_of(parts, list(forget["labels"][:, 0]), averages) + ALPHA * mean_of(
        kept, list(retain["labels"]), averages
    )


@pytest.mark.parametrize("size", [None, 1, 4, 5])
@pytest.mark.parametrize(
    "averages",
    [{}, {"tokens": "answer"}, {"average": "rows"}, {"tokens": "answer", "average": "rows"}],
)
def test_two_steps_follow_the_equation(size: int | None, averages: dict[str, str]):
    module = rmu(seed=4, micro_batch_size=size, **averages)
    network = copy.deepcopy(module.network)
    reference = copy.deepcopy(module.network)
    start = [p.detach().clone() for p in network.parameters()]
    fit(module, unlearning_data(), 2)
    plain = unlearning_data()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    plain.setup("fit")
    for step in range(2):
        optimizer.zero_grad()
        plain_loss(
            network,
            reference,
            *(plain.sources[name].batch(step) for name in ("forget", "retain")),
            seed=4,
            layer=0,
            **averages,
        ).backward()
        optimizer.step()
    ours, theirs = (
        [p.detach() - s for p, s in zip(n.parameters(), start, strict=True)]
        for n in (module.network, network)
    )
    assert relative_error(ours, theirs) < 1e-10


def test_the_target_has_length_c_and_its_own_seed():
    targets = []
    for seed in (0, 0, 1):
        module = rmu(seed=seed)
        torch.manual_seed(seed + 10)
        fit(module, unlearning_data(), 1)
        targets.append(module.target)
        assert "target" not in module.state_dict()
    assert float(targets[0].norm()) == pytest.approx(C, rel=1e-6)
    assert (targets[0] >= 0).all()
    assert torch.equal(targets[0], targets[1]) and not torch.equal(targets[0], targets[2])


def test_forget_rows_reach_the_target_and_retain_rows_stay():
    module = rmu(optimizer=partial(torch.optim.AdamW, lr=0.01), alpha=1.0)
    before = copy.deepcopy(module.network)
    data = unlearning_data()
    fit(module, data, 40)
    forget, retain = (data.sources[name].rows for name in ("forget", "retain"))
    with torch.no_grad():
        # The answer's last position: prompts share their first tokens with those that are to be
        # kept.
        ends = lambda n, rows, *place: hidden(
            n, rows["input_ids"][place], rows["attention_mask"][place], 0
        )[-1]  # noqa: E731
        to_target = [
            [float((ends(n, forget, i, 0) - module.target).norm()) for i in range(8)]
            for n in (before, module.network)
        ]
        moved = [
            float((ends(module.network, retain, i) - ends(before, retain, i)).norm())
            for i in range(8)
        ]
    assert sum(to_target[1]) < 0.7 * sum(to_target[0])
    assert sum(moved) < sum(to_target[0]) - sum(to_target[1]), (
        "what is kept moves less than what is steered"
    )


@pytest.mark.parametrize(("layers", "expected"), [([1], {1}), ([0, 1], {0, 1})])
def test_only_the_chosen_down_projections_are_trained(layers: list[int], expected: set[int]):
    module = llama(train_layers=layers)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, unlearning_data(), 2)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"network.model.layers.{layer}.mlp.down_proj.weight" for layer in expected}


def test_gpt2_names_its_down_projection_otherwise():
    module = rmu(train_layers=[0])
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, unlearning_data(), 1)
    assert {n for n, p in module.named_parameters() if not torch.equal(p, before[n])} == {
        "network.transformer.h.0.mlp.c_proj.weight"
    }


def test_layers_above_get_no_gradient():
    module = llama(optimizer=partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, unlearning_data(), 2)
    moved = {
        name.split(".")[3]
        for name, p in module.named_parameters()
        if "layers" in name and not torch.equal(p, before[name])
    }
    assert moved == {"0", "1"}


def test_lora_uses_the_adapter_off_as_reference():
    module = llama(lora=True)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, unlearning_data(), 3)
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in name for name in moved)
    assert module.reference_source == "adapter_off"
    assert float(module.trainer.callback_metrics["loss/retain"]) > 0


@pytest.mark.parametrize("train_layers", [None, [0, 1]])
def test_a_resumed_run_equals_an_uninterrupted_one(train_layers: list[int] | None, tmp_path: Any):
    whole, first, second = (
        llama(train_layers=train_layers, collapse_factor=100.0, seed=2) for _ in range(3)
    )
    data = {"batch_size": 3, "retain_batch_size": 3}
    fit(whole, unlearning_data(**data), 5)
    fit(first, unlearning_data(**data), 3).save_checkpoint(tmp_path / "run.ckpt")
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=5, max_epochs=-1, limit_val_batches=0, **quiet
    )
    trainer.fit(
        second,
        datamodule=unlearning_data(**data),
        ckpt_path=tmp_path / "run.ckpt",
        weights_only=True,
    )
    assert all(
        torch.equal(a, b) for a, b in zip(second.parameters(), whole.parameters(), strict=True)
    )
    assert torch.equal(second.guard.running, whole.guard.running)


def test_the_guard_watches_rmu_too():
    module = llama(collapse_factor=1.5)
    module.guard.start = module.guard.running = torch.tensor(
        0.5
    )  # as if it had started far better than it is
    with pytest.raises(
        RuntimeError, match=r"collapse: the retain NLL went from 0\.5 to .*collapse_factor=1\.5"
    ):
        fit(module, unlearning_data(), 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steering_coefficient": 0.0}, r"steering_coefficient=0\.0: give a number > 0"),
        (
            {"train_layers": [1], "lora": True},
            r"train_layers=\[1\]: with network\.lora adapters are trained",
        ),
        ({"reference": "cached"}, "reference=cached: this loss reads logits or hidden states"),
        ({"alpha": -1.0}, r"alpha=-1\.0"),
    ],
)
def test_invalid_unlearning_settings_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(TemperError, match=rf"model\.init_args\.{message}"):
        llama(**settings)


@pytest.mark.parametrize(
    ("flag", "value", "named"), [("layer", 3, 3), ("layer", -1, -1), ("train_layers", [1, 5], 5)]
)
def test_a_layer_that_the_network_does_not_have_is_refused(flag: str, value: Any, named: int):
    with pytest.raises(
        TemperError,
        match=rf"model\.init_args\.{flag}={named}: the network has the decoder layers 0 to 2",
    ):
        fit(llama(**{flag: value}), unlearning_data(), 1)


def test_a_network_without_such_projections_is_refused():
    module = llama(train_layers=[1])
    module.network.model.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(
        TemperError, match=r"train_layers=\[1\]: found 0 MLP down projections in LlamaForCausalLM"
    ):
        fit(module, unlearning_data(), 1)
