"""Booster against a separate float64 computation, and its laws."""

import copy
import os
import signal
from functools import partial
from typing import Any

import pytest
import torch

from lightning_modules import BoosterModule, SFTModule
from temper.errors import TemperError
from temper.schedules import WarmupCosine
from tests.objectives import (
    fit,
    global_batches,
    make_data,
    make_held,
    make_module,
    plain_gradient,
    plain_regulariser,
    relative_error,
    same_bits,
    trainable,
    weights,
)


def reference_run(
    network: Any,
    batches: list,
    optimizer: Any,
    scheduler: Any = None,
    lam=2.0,
    alpha=0.05,
    k=1,
    clip=None,
) -> None:
    """Booster written out in plain torch, in place."""
    for step, batch in enumerate(batches):
        if step % k == 0:
            regulariser = plain_regulariser(network, batch["harmful"], lam, alpha)
        for parameter, f, r in zip(
            trainable(network),
            plain_gradient(network, batch["alignment"]),
            regulariser,
            strict=True,
        ):
            parameter.grad = f + r
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trainable(network), clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def test_one_step_has_the_gradient_of_the_equation():
    module = make_module(
        lam=2.0, alpha=0.05, max_grad_norm=None, optimizer=partial(torch.optim.SGD, lr=1.0)
    )
    network = copy.deepcopy(module.network)
    start = weights(network)
    fit(module, make_data(), 1)
    (batch,) = global_batches(make_data(), 1)
    f = plain_gradient(network, batch["alignment"])
    r = plain_regulariser(network, batch["harmful"], 2.0, 0.05)
    step = [a - b for a, b in zip(start, weights(module), strict=True)]
    assert relative_error(step, [a + b for a, b in zip(f, r, strict=True)]) < 1e-10
    # The regulariser is not lost in rounding: without it the gradient is clearly another.
    assert relative_error(step, f) > 1e-3


@pytest.mark.parametrize("k", [1, 2, 3])
def test_three_adamw_steps_follow_the_reference(k: int):
    adamw = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    schedule = partial(WarmupCosine, total_steps=5, warmup_steps=2)
    module = make_held(
        k, lam=2.0, alpha=0.05, max_grad_norm=0.5, optimizer=adamw, lr_scheduler=schedule
    )
    network = copy.deepcopy(module.network)
    optimizer = adamw(trainable(network))
    fit(module, make_data(), 3)
    reference_run(
        network, global_batches(make_data(), 3), optimizer, schedule(optimizer), k=k, clip=0.5
    )
    assert relative_error(weights(module), weights(network)) < 1e-10


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_micro_batches_of_unequal_length_equal_the_whole_batch(size: int):
    whole = make_module(lam=2.0, alpha=0.05)
    split = make_module(lam=2.0, alpha=0.05, micro_batch_size=size)
    fit(whole, make_data(), 3)
    fit(split, make_data(), 3)
    assert relative_error(weights(split), weights(whole)) < 1e-12


@pytest.mark.parametrize("off", [{"lam": 0.0, "alpha": 0.05}, {"lam": 2.0, "alpha": 0.0}])
@pytest.mark.parametrize("double", [True, False])
def test_without_lam_or_alpha_it_is_sft_bit_for_bit(off: dict[str, float], double: bool):
    adamw = partial(torch.optim.AdamW, lr=0.01)
    booster = make_module(double=double, optimizer=adamw, **off)
    sft = make_module(SFTModule, double=double, optimizer=adamw)
    fit(booster, make_data(), 5)
    fit(sft, make_data(), 5)
    assert same_bits(weights(booster), weights(sft))


@pytest.mark.parametrize("k", [1, 2])
def test_a_floor_switches_the_regulariser_off(k: int):
    module = partial(make_held, k, lam=2.0, alpha=0.05)
    plain = module()
    low = module(reduction_floor=-1e9)
    high = module(reduction_floor=1e9)
    sft = make_module(SFTModule)
    for each in (plain, low, high, sft):
        fit(each, make_data(), 3)
    assert same_bits(weights(low), weights(plain))
    assert same_bits(weights(high), weights(sft))
    assert not same_bits(weights(plain), weights(sft))


def test_lora_trains_adapters_alone_and_no_frozen_weight_moves():
    module = make_module(
        lam=2.0, alpha=0.05, lora=True, double=False, optimizer=partial(torch.optim.AdamW, lr=0.05)
    )
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, make_data(), 3)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_passes_and_tokens_are_counted_as_they_are_spent():
    module = make_held(3, lam=1.0)
    fit(module, make_data(), 7)
    assert module.work.passes == 7 + 2 * 3  # refreshed at steps 0, 3 and 6
    batches = global_batches(make_data(), 7)
    tokens = sum(int(b["alignment"]["attention_mask"].sum()) for b in batches)
    tokens += sum(2 * int(batches[i]["harmful"]["attention_mask"].sum()) for i in (0, 3, 6))
    assert int(module.work.tokens) == tokens


def poison(module: Any, bad_steps: set[int], value: float) -> None:
    """Make the harmful loss of some steps non-finite, as an overflow would."""
    honest = module.nll_terms
    calls = {"harmful": 0}

    def terms(rows: Any) -> Any:
        total, count = honest(rows)
        if len(rows["ids"]) == 4:  # the harmful stream's batch size
            step = calls["harmful"] // 2
            calls["harmful"] += 1
            if step in bad_steps:
                total = total * value
        return type(honest(rows))(total, count)

    module.nll_terms = terms


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_harmful_gradient_skips_the_step(value: float):
    module = make_module(lam=2.0, alpha=0.05, optimizer=partial(torch.optim.AdamW, lr=0.01))
    start = weights(module)
    poison(module, {0, 1}, value)
    trainer = fit(module, make_data(), -1, max_epochs=1, limit_train_batches=2)
    assert same_bits(weights(module), start)
    assert (module.skipped_steps, trainer.global_step) == (2, 0)
    assert not trainer.optimizers[0].state


def test_a_skipped_step_leaves_no_trace():
    poisoned = make_module(lam=2.0, alpha=0.05)
    clean = make_module(lam=2.0, alpha=0.05)
    poison(poisoned, {0}, float("nan"))
    fit(poisoned, make_data(), -1, max_epochs=1, limit_train_batches=2)
    data = make_data()
    data.position = lambda: 1
    fit(clean, data, 1)
    assert poisoned.skipped_steps == 1
    assert same_bits(weights(poisoned), weights(clean))


def test_a_skipped_refresh_is_tried_again_and_never_held():
    module = make_held(5, lam=2.0, alpha=0.05)
    poison(module, {0}, float("nan"))
    fit(module, make_data(), 2)
    assert module.work.passes == 3 + 3 + 1
    assert all(torch.isfinite(tensor).all() for tensor in module.kept["held"])


def test_too_many_skips_in_a_row_stop_the_run_with_a_reason():
    module = make_module(max_skipped_steps=3)
    poison(module, set(range(100)), float("nan"))
    with pytest.raises(
        RuntimeError, match="3 steps in a row had a non-finite gradient.*max_skipped_steps"
    ):
        fit(module, make_data(), 50)


def test_a_harmful_gradient_of_zero_displaces_nothing():
    module = make_module(lam=2.0, alpha=0.05)
    sft = make_module(SFTModule)
    poison(module, set(range(100)), 0.0)
    fit(module, make_data(), 2)
    fit(sft, make_data(), 2)
    assert module.skipped_steps == 0
    assert same_bits(weights(module), weights(sft))


def during_displacement(module: Any, action: Any) -> None:
    """Do something in the middle of the second pass, once."""
    honest = module.nll_terms
    done = []

    def terms(rows: Any) -> Any:
        if module.weights.is_displaced and not done:
            done.append(True)
            action()
        return honest(rows)

    module.nll_terms = terms


def test_a_signal_waits_until_weights_are_restored():
    module = make_module(lam=2.0, alpha=0.05)
    start = weights(module)
    seen = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: seen.append(weights(module)))
    try:
        during_displacement(module, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        fit(module, make_data(), 1)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert len(seen) == 1
    assert same_bits(seen[0], start)


def test_no_checkpoint_of_displaced_weights(tmp_path: Any):
    module = make_module(lam=2.0, alpha=0.05)
    start = weights(module)
    target = tmp_path / "run.ckpt"
    during_displacement(module, lambda: module.trainer.save_checkpoint(target))
    with pytest.raises(RuntimeError, match="displaced"):
        fit(module, make_data(), 1)
    assert not target.exists()
    assert same_bits(weights(module), start)


@pytest.mark.parametrize("steps_before", [1, 2, 3, 4])
def test_a_resumed_held_regulariser_is_the_same(steps_before: int, tmp_path: Any):
    settings = {
        "lam": 2.0,
        "alpha": 0.05,
        "refresh_every": 3,
        "double": False,
        "optimizer": partial(torch.optim.AdamW, lr=0.01),
    }
    whole, first, second = (make_held(**settings) for _ in range(3))
    fit(whole, make_data(), 7)
    fit(first, make_data(), steps_before).save_checkpoint(tmp_path / "run.ckpt")
    trainer = fit(second, make_data(), 7, ckpt_path=tmp_path / "run.ckpt")
    assert trainer.global_step == 7
    assert same_bits(weights(second), weights(whole))
    assert (second.work.passes, int(second.work.tokens)) == (
        whole.work.passes,
        int(whole.work.tokens),
    )


def test_the_same_seed_gives_the_same_bits():
    left = make_module(lam=2.0, double=False)
    right = make_module(lam=2.0, double=False)
    fit(left, make_data(), 4)
    fit(right, make_data(), 4)
    assert same_bits(weights(left), weights(right))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("lam", -1.0),
        ("alpha", -0.1),
        ("max_grad_norm", 0.0),
        ("micro_batch_size", 0),
    ],
)
def test_arguments_that_mean_nothing_are_refused_by_name(flag: str, value: float):
    with pytest.raises(TemperError, match=f"model.init_args.{flag}={value}"):
        make_module(BoosterModule, **{flag: value})


def test_a_refresh_every_zero_steps_is_refused():
    with pytest.raises(TemperError, match="model.init_args.refresh_every=0"):
        make_held(0)


@pytest.mark.parametrize("size", [None, 2])
def test_held_for_one_step_it_is_booster(size: int | None):
    settings = {"lam": 2.0, "alpha": 0.05, "micro_batch_size": size}
    adamw = partial(torch.optim.AdamW, lr=0.01)
    paper = make_module(double=False, optimizer=adamw, **settings)
    held = make_held(1, double=False, optimizer=adamw, **settings)
    fit(paper, make_data(), 4)
    fit(held, make_data(), 4)
    assert same_bits(weights(held), weights(paper))
    assert vars(held.work) == vars(paper.work)
