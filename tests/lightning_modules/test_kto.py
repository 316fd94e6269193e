"""KTO against a separate float64 computation; one reference point per global batch, resuming, and
refusals.
"""

import copy
from functools import partial
from typing import Any

import pytest
import torch

from lightning_modules.kto import KTOModule
from temper.errors import TemperError
from temper.models import LoRASpec, NetworkSpec
from tests.objectives import SHAPE, make_module, relative_error, same_bits, trainable, weights
from tests.preference import batches, exact, exact_lora, make_kto, plain_logps, run

WEIGHTS = {"w_desirable": 0.7, "w_undesirable": 1.3}


def plain_loss(network, reference, rows, beta=0.1, w_desirable=1.0, w_undesirable=1.0):
    """The loss and z, row by row."""
    with torch.no_grad():
        mismatched = [
            a - b
            for a, b in zip(
                plain_logps(network, rows, 1)[0], plain_logps(reference, rows, 1)[0], strict=True
            )
        ]
        own_reference = plain_logps(reference, rows, 0)[0]
    z = max(0.0, float(sum(mismatched)) / len(mismatched))
    total = 0.0
    for logp, reference_logp, desirable in zip(
        plain_logps(network, rows, 0)[0], own_reference, rows["desirable"], strict=True
    ):
        ratio = logp - reference_logp
        gain = ratio - z if desirable else z - ratio
        weight = w_desirable if desirable else w_undesirable
        total = total + weight * (1 - 1 / (1 + torch.exp(-beta * gain)))
    return total / len(mismatched), z


def plain_run(network, steps: int, lr: float, **settings: Any) -> list[float]:
    """Gradient descent on `plain_loss` in place; z of every step."""
    reference = copy.deepcopy(network)
    points = []
    for rows in batches(make_kto(), steps):
        loss, z = plain_loss(network, reference, rows, **settings)
        with torch.no_grad():
            for parameter, gradient in zip(
                trainable(network), torch.autograd.grad(loss, trainable(network)), strict=True
            ):
                parameter -= lr * gradient
        points.append(z)
    return points


# On this network, steps down the loss leave z at its floor and steps up raise it.
@pytest.mark.parametrize(("lr", "floor"), [(0.5, True), (-0.5, False)])
def test_four_steps_follow_a_plain_computation(lr, floor):
    descent = partial(torch.optim.SGD, lr=abs(lr), maximize=lr < 0)
    module = exact(KTOModule, beta=0.3, max_grad_norm=None, optimizer=descent, **WEIGHTS)
    network = copy.deepcopy(module.network)
    start = weights(module)
    trainer = run(module, make_kto(), 4)
    points = plain_run(network, 4, lr, beta=0.3, **WEIGHTS)
    assert relative_error(weights(module), weights(network), start) < 1e-10
    assert float(trainer.callback_metrics["preference/kl"]) == pytest.approx(points[-1], rel=1e-10)
    assert (points[-1] == 0.0) == floor


def test_the_first_loss_is_half_the_mean_weight():
    """Policy and reference are one: every ratio and z are 0, and sigma(0) = 1/2."""
    trainer = run(exact(KTOModule, **WEIGHTS), make_kto(), 1)
    share = float(batches(make_kto(), 1)[0]["desirable"].double().mean())
    assert float(trainer.callback_metrics["loss/preference"]) == pytest.approx(
        (share * 0.7 + (1 - share) * 1.3) / 2, rel=1e-14
    )
    assert trainer.callback_metrics["preference/kl"] == 0


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_micro_batches_share_one_reference_point(size):
    ascent = partial(torch.optim.SGD, lr=0.5, maximize=True)  # so that z leaves its floor
    whole, split = (
        exact(KTOModule, beta=0.3, micro_batch_size=n, max_grad_norm=None, optimizer=ascent)
        for n in (None, size)
    )
    start = weights(whole)
    z = float(run(whole, make_kto(), 4).callback_metrics["preference/kl"])
    assert float(run(split, make_kto(), 4).callback_metrics["preference/kl"]) == pytest.approx(
        z, rel=1e-12
    )
    assert z > 0
    assert relative_error(weights(split), weights(whole), start) < 1e-12


def test_the_reference_point_is_summed_over_ranks():
    """With another rank whose six rows sum to 60, which this one stands in for."""
    module = exact(KTOModule)
    run(module, make_kto(), 1)
    rows = batches(make_kto(), 1)[0]
    own_sums, z = module.reference_sweep(rows)
    module.weights.global_sum = lambda values: (
        values + torch.tensor([60.0, 6.0], dtype=values.dtype)
    )
    with torch.no_grad():
        ratios = module.score(rows).sums - module.reference_scores(rows, "kto").sums
    assert float(module.reference_sweep(rows)[1]) == pytest.approx(
        max(0.0, (float(ratios[:, 1].sum()) + 60) / 12), rel=1e-12
    )
    assert float(z) == pytest.approx(max(0.0, float(ratios[:, 1].mean())), rel=1e-12)
    assert own_sums.tolist() == pytest.approx(
        module.reference_scores(rows, "kto").sums[:, 0].tolist(), rel=1e-14
    )


def test_adapter_cache_and_copy_references_give_same_steps(tmp_path):
    settings = {
        "max_grad_norm": None,
        "reference_cache": str(tmp_path),
        "optimizer": partial(torch.optim.SGD, lr=1.0),
    }
    modules = {
        source: exact_lora(KTOModule, reference=source, **settings)
        for source in ("frozen", "adapter_off", "cached")
    }
    start = weights(modules["frozen"])
    for module in modules.values():
        run(module, make_kto(), 3)
    assert (
        relative_error(weights(modules["adapter_off"]), weights(modules["frozen"]), start) < 1e-13
    )
    assert relative_error(weights(modules["cached"]), weights(modules["frozen"]), start) < 1e-11


def test_passes_are_counted_as_they_are_spent(tmp_path):
    frozen, cached = (
        exact(KTOModule, reference=source, reference_cache=str(tmp_path))
        for source in ("frozen", "cached")
    )
    run(frozen, make_kto(), 2)
    run(cached, make_kto(), 2)
    assert (frozen.work.passes, frozen.work.forwards) == (2, 4)
    assert (cached.work.passes, cached.work.forwards) == (2, 2)
    tokens = [rows["attention_mask"].sum(dim=(0, 2)) for rows in batches(make_kto(), 2)]
    assert int(cached.work.tokens) == sum(int(own) for own, _ in tokens)
    assert int(cached.work.forward_tokens) == sum(int(mismatched) for _, mismatched in tokens)


@pytest.mark.parametrize("source", ["frozen", "cached"])
def test_resuming_equals_never_having_stopped(source, tmp_path):
    settings = {
        "reference": source,
        "reference_cache": str(tmp_path / "cache"),
        "optimizer": partial(torch.optim.AdamW, lr=0.01),
    }
    whole, first, second = (
        make_module(KTOModule, data=make_kto(), double=False, **settings) for _ in range(3)
    )
    run(whole, make_kto(), 4)
    run(first, make_kto(), 2).save_checkpoint(tmp_path / "run.ckpt")
    run(second, make_kto(), 4, tmp_path / "run.ckpt")
    assert same_bits(weights(second), weights(whole))


def test_lora_trains_adapters_alone():
    module = make_module(
        KTOModule,
        data=make_kto(),
        double=False,
        lora=True,
        optimizer=partial(torch.optim.AdamW, lr=0.05),
    )
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    run(module, make_kto(), 2)
    assert {name for name, p in module.named_parameters() if not torch.equal(p, before[name])} == {
        n for n in before if "lora_" in n
    }


@pytest.mark.parametrize(
    ("flag", "value"), [("beta", 0.0), ("w_desirable", -1.0), ("w_undesirable", float("nan"))]
)
def test_arguments_that_mean_nothing_are_refused_by_name(flag, value):
    with pytest.raises(TemperError, match=f"model.init_args.{flag}={value}: give a"):
        KTOModule(NetworkSpec(shape=SHAPE), **{flag: value})


def test_dropout_in_the_adapter_is_refused():
    with pytest.raises(TemperError, match=r"network.lora.dropout=0.1"):
        KTOModule(NetworkSpec(shape=SHAPE, lora=LoRASpec(dropout=0.1)))
