"""SafeInstruct: the weighted sum of two means, and SFT where the weight is 0."""

import copy
from functools import partial
from typing import Any

import pytest
import torch

from datamodules import SyntheticAttack
from lightning_modules import SFTModule
from lightning_modules.lisa import SafeInstructModule
from temper.errors import TemperError
from tests.lightning_modules.test_lisa import defended
from tests.objectives import (
    fit,
    global_batches,
    make_module,
    plain_gradient,
    plain_mean_nll,
    relative_error,
    same_bits,
    trainable,
    weights,
)

ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)


def make(**settings: Any) -> Any:
    return make_module(SafeInstructModule, defended(), **settings)


@pytest.mark.parametrize("lam", [0.3, 2.0])
def test_one_step_follows_the_equation(lam: float):
    module = make(lam=lam, max_grad_norm=None, optimizer=partial(torch.optim.SGD, lr=1.0))
    network = copy.deepcopy(module.network)
    start = weights(module)
    trainer = fit(module, defended(), 1)
    (batch,) = global_batches(defended(), 1)
    user, alignment = (plain_gradient(network, batch[name]) for name in ("user", "alignment"))
    step = [a - b for a, b in zip(start, weights(module), strict=True)]
    assert relative_error(step, [u + lam * a for u, a in zip(user, alignment, strict=True)]) < 1e-10
    for name in ("user", "alignment"):
        assert float(trainer.callback_metrics[f"loss/{name}"]) == pytest.approx(
            float(plain_mean_nll(network, batch[name]).detach()), rel=1e-6
        )


def test_three_clipped_adamw_steps_follow_the_equation():
    module = make(lam=0.7, max_grad_norm=0.5, optimizer=ADAMW)
    network = copy.deepcopy(module.network)
    optimizer = ADAMW(trainable(network))
    fit(module, defended(), 3)
    for batch in global_batches(defended(), 3):
        gradients = zip(
            *(plain_gradient(network, batch[name]) for name in ("user", "alignment")), strict=True
        )
        for parameter, (user, alignment) in zip(trainable(network), gradients, strict=True):
            parameter.grad = user + 0.7 * alignment
        torch.nn.utils.clip_grad_norm_(trainable(network), 0.5)
        optimizer.step()
    assert relative_error(weights(module), weights(network)) < 1e-10


@pytest.mark.parametrize("double", [True, False])
def test_without_lam_it_is_sft_on_the_user_bit_for_bit(double: bool):
    mixed = make(lam=0.0, double=double, optimizer=ADAMW)
    sft = make_module(SFTModule, defended(), double=double, optimizer=ADAMW)
    fit(mixed, defended(), 4)
    fit(sft, defended(n_alignment=0), 4)
    assert same_bits(weights(mixed), weights(sft))
    assert mixed.work.passes == 4


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_of_unequal_length_equal_the_whole_batch(size: int):
    whole = make(lam=0.7)
    split = make(lam=0.7, micro_batch_size=size)
    fit(whole, defended(), 3)
    fit(split, defended(), 3)
    assert relative_error(weights(split), weights(whole)) < 1e-12


def test_the_weight_does_not_depend_on_the_batch_sizes():
    one = make(lam=0.7, optimizer=partial(torch.optim.SGD, lr=1.0))
    two = make(lam=0.7, optimizer=partial(torch.optim.SGD, lr=1.0))
    fit(one, defended(), 1)
    doubled = defended()
    doubled.setup("fit")
    rows = doubled.sources["alignment"].batch(0)
    doubled.setup = lambda stage: None
    twice = {name: torch.cat([value, value]) for name, value in rows.items()}
    doubled.sources["alignment"].batch = lambda number: twice  # the same rows twice: the same mean
    fit(two, doubled, 1)
    assert relative_error(weights(two), weights(one)) < 1e-10


def test_lora_trains_adapters_alone():
    module = make(lam=1.0, lora=True, double=False, optimizer=partial(torch.optim.AdamW, lr=0.05))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, defended(), 2)
    assert {n for n, p in module.named_parameters() if not torch.equal(p, before[n])} == {
        n for n in before if "lora_" in n
    }


def test_mixing_is_sft_on_a_set_with_safety_rows():
    sft = make_module(SFTModule, defended())
    fit(
        sft,
        SyntheticAttack(
            preset="tiny", n_rows=10, harmful_ratio=0.2, batch_size=6, n_safety=2, n_eval=4
        ),
        2,
    )
    assert sft.work.passes == 2


def test_a_negative_weight_is_refused():
    with pytest.raises(TemperError, match=r"model\.init_args\.lam=-1\.0: give a number >= 0"):
        make(lam=-1.0)
