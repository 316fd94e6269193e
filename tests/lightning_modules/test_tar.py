"""TAR against a separate float64 computation with a real AdamW on a copy, and its laws."""

import copy
import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_modules import SFTModule
from lightning_modules.tar import TARModule
from temper.errors import TemperError
from tests.objectives import (
    fit,
    global_batches,
    make_data,
    make_module,
    plain_mean_nll,
    relative_error,
    same_bits,
    trainable,
    trained_weights,
)

SGD = partial(torch.optim.SGD, lr=1.0)
INNER = {
    "inner_steps": 4,
    "inner_lr": 0.02,
    "tamper_every": 2,
    "tamper_growth": 0.3,
    "tamper_weight": 1.7,
}


def heldout_data(**changes: Any) -> Any:
    return make_data(**{"n_heldout": 5, "heldout_batch_size": 3} | changes)


def step_of(module: Any, data: Any) -> list[torch.Tensor]:
    """What one step of plain SGD with rate 1 subtracts: the gradient."""
    start = trained_weights(module)
    fit(module, data, 1)
    return [a - b for a, b in zip(start, trained_weights(module), strict=True)]


def plain_negative_entropy(network: Any, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    terms = []
    for ids, mask, labels in zip(
        rows["input_ids"], rows["attention_mask"], rows["labels"], strict=True
    ):
        p = torch.softmax(network(input_ids=ids[None, : int(mask.sum())]).logits[0], -1)
        terms += [
            (p[t - 1] * torch.log(p[t - 1])).sum()
            for t in range(1, int(mask.sum()))
            if labels[t] != -100
        ]
    return sum(terms) / len(terms)


def plain_sum(
    network: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    logps = torch.log_softmax(network(input_ids=ids[None, : int(mask.sum())]).logits[0], -1)
    return sum(logps[t - 1, labels[t]] for t in range(1, int(mask.sum())) if labels[t] != -100)


def plain_preference(
    network: Any, reference: Any, rows: dict[str, torch.Tensor], beta: float = 0.1
) -> torch.Tensor:
    losses = []
    for pair in zip(rows["input_ids"], rows["attention_mask"], rows["labels"], strict=True):
        gains = [
            plain_sum(network, *(x[i] for x in pair))
            - plain_sum(reference, *(x[i] for x in pair)).detach()
            for i in (0, 1)
        ]
        losses.append(-torch.log(torch.sigmoid(beta * (gains[0] - gains[1]))))
    return sum(losses) / len(losses)


def plain_retain(
    network: Any, reference: Any, rows: dict[str, torch.Tensor], weight: float
) -> torch.Tensor:
    distances = []
    for ids, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True):
        both = [
            net(input_ids=ids[None, : int(mask.sum())], output_hidden_states=True).hidden_states
            for net in (network, reference)
        ]
        for t in range(int(mask.sum())):
            norms = [
                torch.sqrt(((mine[0, t] - theirs[0, t].detach()) ** 2).sum())
                for mine, theirs in zip(*both, strict=True)
            ]
            distances.append(sum(norms) / len(norms))
    return plain_mean_nll(network, rows) + weight * sum(distances) / len(distances)


def plain_gradient(
    network: Any, reference: Any, batch: dict[str, Any], kind: str, weight: float, **inner: float
) -> list[torch.Tensor]:
    """TAR written out: a copy is attacked by torch's own AdamW."""
    k = inner["inner_steps"]
    copied = copy.deepcopy(network)
    adversary = torch.optim.AdamW(
        trainable(copied), lr=inner["inner_lr"], weight_decay=inner.get("inner_weight_decay", 0.01)
    )
    total = list(
        torch.autograd.grad(
            plain_retain(network, reference, batch["alignment"], weight), trainable(network)
        )
    )
    for i in range(k):
        adversary.zero_grad()
        plain_mean_nll(
            copied, {name: value[i::k] for name, value in batch["harmful"].items()}
        ).backward()
        adversary.step()
        if (i + 1) % inner["tamper_every"] == 0:
            tamper = (
                plain_negative_entropy(copied, batch["harmful_heldout"])
                if kind == "entropy"
                else plain_preference(copied, reference, batch["heldout_pairs"])
            )
            scale = inner["tamper_weight"] * math.exp(inner["tamper_growth"] * (i - (k - 1)))
            total = [
                g + scale * t
                for g, t in zip(total, torch.autograd.grad(tamper, trainable(copied)), strict=True)
            ]
    return total


def shifted(network: Any) -> Any:
    """A copy with other weights: distances to it have a gradient, as they have after the first
    step.
    """
    other = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            )
    return other


@pytest.mark.parametrize("kind", ["entropy", "preference"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_one_step_has_the_gradient_of_the_equation(kind: str, decay: float):
    module = make_module(
        TARModule,
        tamper_loss=kind,
        inner_weight_decay=decay,
        max_grad_norm=None,
        optimizer=SGD,
        **INNER,
    )
    network = copy.deepcopy(module.network)
    reference = shifted(module.network)
    build = module._build_reference

    def build_shifted() -> Any:
        built = build()
        built.network.load_state_dict(reference.state_dict())
        return built

    module._build_reference = build_shifted
    step = step_of(module, heldout_data())
    (batch,) = global_batches(heldout_data(), 1)
    expected = plain_gradient(
        network, reference, batch, kind, 1.0, **INNER, inner_weight_decay=decay
    )
    assert relative_error(step, expected) < 1e-9
    retain = torch.autograd.grad(
        plain_retain(network, reference, batch["alignment"], 1.0), trainable(network)
    )
    assert relative_error(step, list(retain)) > 1e-2, (
        "the tamper-resistance gradient is not lost in rounding"
    )


@pytest.mark.parametrize("off", [{"inner_steps": 0}, {"tamper_weight": 0.0}])
def test_without_inner_steps_the_retain_step_is_left(off: dict[str, float]):
    module = make_module(TARModule, max_grad_norm=None, optimizer=SGD, **INNER | off)
    network = copy.deepcopy(module.network)
    start = trained_weights(module)
    expected = trainable(network)
    fit(module, make_data(), 3)  # data without a held-out stream
    reference = copy.deepcopy(network)
    for batch in global_batches(make_data(), 3):
        if all(torch.equal(a, b) for a, b in zip(expected, trainable(reference), strict=True)):
            loss = plain_mean_nll(
                network, batch["alignment"]
            )  # at the reference the distance has no gradient
        else:
            loss = plain_retain(network, reference, batch["alignment"], 1.0)
        with torch.no_grad():
            for parameter, g in zip(expected, torch.autograd.grad(loss, expected), strict=True):
                parameter -= g
    assert relative_error(trained_weights(module), [p.detach() for p in expected]) < 1e-10
    assert not same_bits(start, trained_weights(module))
    assert module.work.passes == 3


@pytest.mark.parametrize("off", [{"inner_steps": 0}, {"tamper_weight": 0.0}])
def test_without_representations_either_it_is_sft_bit_for_bit(off: dict[str, float]):
    tar = make_module(TARModule, representation_weight=0.0, **INNER | off)
    sft = make_module(SFTModule)
    for module in (tar, sft):
        fit(module, make_data(), 3)
    assert same_bits(trained_weights(tar), trained_weights(sft))
    assert tar._reference is None


def test_weights_are_restored_after_the_simulated_attack():
    module = make_module(
        TARModule,
        double=False,
        optimizer=partial(torch.optim.SGD, lr=0.0),
        **INNER | {"inner_lr": 0.3},
    )
    start = trained_weights(module)
    moved = []
    honest = module.nll_terms
    module.nll_terms = lambda rows: (
        moved.append(not same_bits(trained_weights(module), start)),
        honest(rows),
    )[1]
    fit(module, heldout_data(), 2)
    assert same_bits(trained_weights(module), start)
    assert moved == [False, True, True, True] * 2, (
        "the adversary's first gradient is at the weights themselves"
    )


@pytest.mark.parametrize("kind", ["entropy", "preference"])
def test_micro_batches_of_unequal_length_equal_the_whole_batch(kind: str):
    whole, split = (
        make_module(TARModule, micro_batch_size=size, tamper_loss=kind, **INNER)
        for size in (None, 2)
    )
    for module in (whole, split):
        fit(module, heldout_data(harmful_batch_size=4, n_harmful=6), 2)
    assert relative_error(trained_weights(split), trained_weights(whole)) < 1e-11


def test_the_adversarys_batches_do_not_depend_on_ranks():
    rows = torch.arange(12)
    for ranks in (1, 2, 3):
        shares = rows.chunk(ranks)
        for i in range(2):
            assert sorted(int(r) for share in shares for r in share[i::2]) == rows[i::2].tolist()


def test_lora_trains_adapters_alone():
    module = make_module(
        TARModule, lora=True, double=False, optimizer=partial(torch.optim.AdamW, lr=0.05), **INNER
    )
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, heldout_data(), 2)
    assert {name for name, p in module.named_parameters() if not torch.equal(p, before[name])} == {
        name for name in before if "lora_" in name
    }


def test_a_non_finite_inner_gradient_skips_the_step():
    module = make_module(TARModule, optimizer=partial(torch.optim.AdamW, lr=0.01), **INNER)
    start = trained_weights(module)
    honest = module.nll_terms
    calls = []

    def poisoned(rows: Any) -> Any:
        calls.append(1)
        total, count = honest(rows)
        return type(honest(rows))(total * float("inf") if len(calls) == 3 else total, count)

    module.nll_terms = poisoned
    fit(module, heldout_data(), -1, max_epochs=1, limit_train_batches=1)
    assert same_bits(trained_weights(module), start)
    assert module.skipped_steps == 1


def test_passes_are_counted_as_they_are_spent():
    module = make_module(TARModule, **INNER)
    fit(module, heldout_data(), 2)
    assert module.work.passes == 2 * (4 + 2 + 1)
    assert module.work.forwards == 2


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Any):
    import lightning.pytorch as L

    settings = {"double": False, "optimizer": partial(torch.optim.AdamW, lr=0.01)} | INNER
    whole, first, second = (make_module(TARModule, **settings) for _ in range(3))
    fit(whole, heldout_data(), 4)
    fit(first, heldout_data(), 2).save_checkpoint(tmp_path / "run.ckpt")
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
        second, datamodule=heldout_data(), ckpt_path=tmp_path / "run.ckpt", weights_only=True
    )
    assert same_bits(trained_weights(second), trained_weights(whole))


@pytest.mark.parametrize(("steps", "ranks"), [(3, 1), (2, 3)])
def test_an_indivisible_harmful_batch_is_refused(steps: int, ranks: int):
    module = make_module(TARModule, **INNER | {"inner_steps": steps, "tamper_every": 1})
    data = heldout_data()
    data.setup("fit")
    module._weights = SimpleNamespace(world_size=ranks)  # type: ignore[assignment]
    module._trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    with pytest.raises(
        TemperError,
        match=rf"'harmful': batch size 4 .* {steps} inner steps on {ranks} ranks",
    ):
        module.on_fit_start()


def test_data_without_held_out_stream_are_refused():
    with pytest.raises(TemperError, match="reads the stream 'harmful_heldout'"):
        fit(make_module(TARModule, **INNER), make_data(), 1)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("inner_lr", -1.0),
        ("inner_steps", -4),
        ("tamper_weight", -0.1),
        ("tamper_every", 0),
        ("tamper_every", 3),
        ("tamper_loss", "wga"),
        ("representation_weight", -1.0),
        ("fused_loss", True),
        ("reference", "cached"),
    ],
)
def test_arguments_that_mean_nothing_are_refused_by_name(flag: str, value: Any):
    with pytest.raises(TemperError, match=f"(?i)model.init_args.{flag}={value}"):
        make_module(TARModule, **INNER | {flag: value})
