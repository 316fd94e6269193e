"""Booster+Vaccine: Booster where rho is 0, Vaccine where lam is 0, and their sum."""

import copy
from functools import partial
from typing import Any

import pytest
import torch

from lightning_modules.booster_vaccine import BoosterVaccineModule
from lightning_modules.vaccine import VaccineModule
from temper.errors import TemperError
from tests.lightning_modules.test_vaccine import plain_vaccine
from tests.objectives import (
    fit,
    global_batches,
    make_data,
    make_held,
    make_module,
    plain_regulariser,
    relative_error,
    same_bits,
    weights,
)

ADAMW = partial(torch.optim.AdamW, lr=0.01)
BOOSTER: dict[str, Any] = {"lam": 2.0, "alpha": 0.05}


def test_one_step_has_the_gradient_of_the_equation():
    module = make_module(
        BoosterVaccineModule,
        rho=0.7,
        max_grad_norm=None,
        optimizer=partial(torch.optim.SGD, lr=1.0),
        **BOOSTER,
    )
    network = copy.deepcopy(module.network)
    start = weights(module)
    trainer = fit(module, make_data(), 1)
    (batch,) = global_batches(make_data(), 1)
    regulariser = plain_regulariser(network, batch["harmful"], **BOOSTER)
    alignment, loss, perturbed = plain_vaccine(network, batch["alignment"], 0.7)
    step = [a - b for a, b in zip(start, weights(module), strict=True)]
    assert (
        relative_error(step, [a + b for a, b in zip(alignment, regulariser, strict=True)]) < 1e-10
    )
    assert relative_error(step, alignment) > 1e-3
    assert float(trainer.callback_metrics["loss/alignment"]) == pytest.approx(loss, rel=1e-6)
    assert float(trainer.callback_metrics["vaccine/perturbed_loss"]) == pytest.approx(
        perturbed, rel=1e-6
    )


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_without_rho_it_is_booster_bit_for_bit(double: bool, k: int):
    both = make_module(
        BoosterVaccineModule, double=double, rho=0.0, refresh_every=k, optimizer=ADAMW, **BOOSTER
    )
    booster = make_held(k, double=double, optimizer=ADAMW, **BOOSTER)
    fit(both, make_data(), 4)
    fit(booster, make_data(), 4)
    assert same_bits(weights(both), weights(booster))


@pytest.mark.parametrize("double", [True, False])
def test_its_alignment_part_is_vaccines(double: bool):
    both = make_module(BoosterVaccineModule, double=double, rho=0.7, optimizer=ADAMW, lam=0.0)
    vaccine = make_module(VaccineModule, double=double, rho=0.7, optimizer=ADAMW)
    fit(both, make_data(), 3)
    fit(vaccine, make_data(), 3)
    assert same_bits(weights(both), weights(vaccine))


def test_four_passes_per_step_and_fewer_with_a_held_regulariser():
    for k, passes in ((1, 4 * 4), (3, 2 * 4 + 2 * 2)):
        module = make_module(BoosterVaccineModule, rho=0.7, refresh_every=k, **BOOSTER)
        fit(module, make_data(), 4)
        assert module.work.passes == passes


def test_micro_batches_of_unequal_length_equal_the_whole_batch():
    whole, split = (
        make_module(BoosterVaccineModule, rho=0.7, micro_batch_size=size, **BOOSTER)
        for size in (None, 4)
    )
    fit(whole, make_data(), 2)
    fit(split, make_data(), 2)
    assert relative_error(weights(split), weights(whole)) < 1e-12


def test_a_first_pass_that_is_not_finite_skips_the_step():
    module = make_module(BoosterVaccineModule, optimizer=ADAMW, **BOOSTER)
    start = weights(module)
    honest = module.nll_terms
    passes = []

    def overflow(rows: Any) -> Any:
        total, count = honest(rows)
        if len(rows["ids"]) == 6:  # the alignment stream's batch size
            passes.append(None)
            total = total * (float("inf") if len(passes) % 2 else 1.0)
        return type(honest(rows))(total, count)

    module.nll_terms = overflow
    fit(module, make_data(), -1, max_epochs=1, limit_train_batches=2)
    assert (module.skipped_steps, len(passes)) == (2, 4)
    assert same_bits(weights(module), start)


def test_lora_trains_adapters_alone():
    optimizer = partial(torch.optim.AdamW, lr=0.05)
    module = make_module(
        BoosterVaccineModule, rho=0.7, lora=True, double=False, optimizer=optimizer, **BOOSTER
    )
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, make_data(), 2)
    assert {n for n, p in module.named_parameters() if not torch.equal(p, before[n])} == {
        n for n in before if "lora_" in n
    }


@pytest.mark.parametrize(("flag", "value"), [("rho", -0.5), ("lam", -1.0)])
def test_bad_arguments_are_refused_by_name(flag: str, value: float):
    with pytest.raises(TemperError, match=rf"model\.init_args\.{flag}={value}"):
        make_module(BoosterVaccineModule, **{flag: value})
