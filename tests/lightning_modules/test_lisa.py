"""Lisa: turns, the proximal gradient, and a resume across a switch."""

import copy
from functools import partial
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from datamodules import SyntheticAttack
from lightning_modules import SFTModule
from lightning_modules.lisa import LisaModule
from temper.errors import TemperError
from tests.objectives import (
    fit,
    global_batches,
    make_module,
    plain_gradient,
    relative_error,
    same_bits,
    trainable,
    weights,
)

ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
# A key's bias has no gradient in theory and rounding noise in practice; Adam divides by that noise,
# and a proximal term sees what it makes of it. So what is compared to ten digits is trained with
# momentum alone.
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def defended(**changes: Any) -> SyntheticAttack:
    """Ten rows of a user in batches of five, eight of the defender in batches of four."""
    user = {
        "preset": "tiny",
        "n_rows": 10,
        "harmful_ratio": 0.2,
        "batch_size": 5,
        "n_eval": 4,
        "seed": 1,
    }
    return SyntheticAttack(**(user | {"n_alignment": 8, "alignment_batch_size": 4} | changes))


def make(**settings: Any) -> Any:
    settings = {"rho": 3.0, "alignment_steps": 2, "user_steps": 3, "optimizer": ADAMW} | settings
    return make_module(LisaModule, defended(), **settings)


def streams_of(module: Any, steps: int) -> list[str]:
    """Which stream each step trained on, told apart by the batch size."""
    seen = []
    honest = module.gradient

    def gradient(rows: Any) -> Any:
        seen.append("user" if len(rows["ids"]) == 5 else "alignment")
        return honest(rows)

    module.gradient = gradient
    fit(module, defended(), steps)
    return seen


def test_streams_take_turns_and_alignment_begins():
    assert streams_of(make(), 8) == ["alignment"] * 2 + ["user"] * 3 + ["alignment"] * 2 + ["user"]


@pytest.mark.parametrize("clip", [None, 0.3])
def test_steps_follow_the_plain_computation_over_three_switches(clip: float | None):
    module = make(max_grad_norm=clip, optimizer=SGD)
    network = copy.deepcopy(module.network)
    optimizer = SGD(trainable(network))
    fit(module, defended(), 8)
    for step, batch in enumerate(global_batches(defended(), 8)):
        if step in (0, 2, 5, 7):
            at_switch = [p.detach().clone() for p in trainable(network)]
        rows = batch["alignment" if step in (0, 1, 5, 6) else "user"]
        for parameter, gradient, start in zip(
            trainable(network), plain_gradient(network, rows), at_switch, strict=True
        ):
            parameter.grad = gradient + 3.0 * (
                parameter.detach() - start
            )  # of rho/2 * ||w - w_s||^2
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trainable(network), clip)
        optimizer.step()
    assert relative_error(weights(module), weights(network)) < 1e-10


def test_the_proximal_term_starts_a_step_after_a_switch():
    with_term = make(optimizer=partial(torch.optim.SGD, lr=0.1))
    without = make(rho=0.0, optimizer=partial(torch.optim.SGD, lr=0.1))
    fit(with_term, defended(), 1)
    fit(without, defended(), 1)
    assert same_bits(weights(with_term), weights(without))
    fit(with_term, defended(), 2)
    fit(without, defended(), 2)
    assert not same_bits(weights(with_term), weights(without))


def test_without_rho_the_users_turn_is_sft():
    lisa = make(rho=0.0, alignment_steps=1, user_steps=100)
    sft = make_module(SFTModule, defended(), optimizer=ADAMW)
    lisa.alignment_steps = 0  # every step is the user's, which the command line refuses
    fit(lisa, defended(), 3)
    fit(sft, defended(), 3)
    assert same_bits(weights(lisa), weights(sft))


def test_a_strong_proximal_term_holds_the_weights():
    distances = []
    for rho in (0.0, 1.0, 50.0):
        module = make(
            rho=rho,
            alignment_steps=1,
            user_steps=100,
            max_grad_norm=None,
            optimizer=partial(torch.optim.SGD, lr=0.01),
        )
        start = weights(module)
        fit(module, defended(), 12)
        distances.append(
            float(
                torch.sqrt(
                    sum(((a - b) ** 2).sum() for a, b in zip(weights(module), start, strict=True))
                )
            )
        )
    assert distances[0] > distances[1] > 2 * distances[2]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("steps_before", [1, 2, 3, 5])
def test_resuming_across_a_switch_equals_never_having_stopped(
    steps_before: int, double: bool, tmp_path: Any
):
    whole, first, second = (make(double=double) for _ in range(3))
    fit(whole, defended(), 7)
    fit(first, defended(), steps_before).save_checkpoint(tmp_path / "run.ckpt")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=7,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(second, datamodule=defended(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert trainer.global_step == 7
    assert same_bits(weights(second), weights(whole))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_of_unequal_length_equal_the_whole_batch(size: int):
    whole = make(optimizer=SGD)
    split = make(optimizer=SGD, micro_batch_size=size)
    fit(whole, defended(), 4)
    fit(split, defended(), 4)
    assert relative_error(weights(split), weights(whole)) < 1e-12


def test_a_skipped_step_does_not_count_as_a_turn():
    module = make(alignment_steps=1)
    honest = module.nll_terms
    calls = []

    def overflow(rows: Any) -> Any:
        calls.append(len(rows["ids"]))
        total, count = honest(rows)
        return type(honest(rows))(total * (float("nan") if len(calls) == 1 else 1.0), count)

    module.nll_terms = overflow
    fit(module, defended(), 2)
    assert calls == [4, 4, 5]  # alignment again, then the user
    assert module.skipped_steps == 1


def test_lora_trains_and_copies_adapters_alone():
    module = make(lora=True, double=False, optimizer=partial(torch.optim.AdamW, lr=0.05))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, defended(), 3)
    adapters = {name for name in before if "lora_" in name}
    assert {
        name for name, p in module.named_parameters() if not torch.equal(p, before[name])
    } == adapters
    assert len(module.kept["at_switch"].tensors) == len(adapters)


def test_data_without_the_defenders_stream_are_refused():
    with pytest.raises(TemperError, match="LisaModule reads the stream 'alignment'"):
        fit(make(), defended(n_alignment=0), 1)


@pytest.mark.parametrize(
    ("flag", "value"), [("rho", -1.0), ("alignment_steps", 0), ("user_steps", 0)]
)
def test_bad_arguments_are_refused_by_name(flag: str, value: float):
    with pytest.raises(TemperError, match=rf"model\.init_args\.{flag}={value}: give a"):
        make(**{flag: value})
