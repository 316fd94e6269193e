"""Costs that objectives declare, against the steps they take."""

from itertools import groupby
from pathlib import Path

import pytest

from lightning_modules import AntidoteModule, SOMFModule
from temper.models import NetworkSpec
from tests.objective_cases import CASES, Case
from tests.objectives import fit, make_module

STEPS = 6  # a multiple of every period among the cases
KINDS = {"weights": "passes", "outputs": "passes", "none": "forwards"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_passes_are_those_of_a_run(case: Case):
    data = case.make_data()
    module = make_module(case.kind, data, **case.settings)
    fit(module, data, STEPS)
    planned = {"passes": 0.0, "forwards": 0.0}
    for each in module.cost().passes:
        planned[KINDS[each.gradient]] += each.times * STEPS
    assert planned == {"passes": module.work.passes, "forwards": module.work.forwards}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_streams_are_those_that_the_objective_reads(case: Case):
    module = make_module(case.kind, case.make_data(), **case.settings)
    found = {each.stream for each in module.cost().passes} - {None}
    assert found == set(module.streams or ())


def test_a_reference_is_a_copy_unless_it_is_the_adapters_base():
    case = next(case for case in CASES if case.name == "DPOModule")
    data = case.make_data()
    assert make_module(case.kind, data).cost().copies == 1
    assert make_module(case.kind, data, double=False, lora=True).cost().copies == 0
    cached = make_module(case.kind, data, reference="cached").cost()
    assert cached.copies == 0 and all(each.gradient == "weights" for each in cached.passes)
    assert make_module(case.kind, data, variant="simpo").cost().copies == 0


def test_booster_holds_one_vector_and_held_booster_two():
    booster = next(case for case in CASES if case.name == "HeldBoosterModule")
    for every, held in ((1, 0), (4, 1)):
        module = make_module(booster.kind, refresh_every=every)
        cost = module.cost()
        vectors = [
            (key, [each.vectors for each in group])
            for key, group in groupby(cost.passes, lambda each: each.displaced)
        ]
        assert vectors == [(False, [held]), (True, [1 + held]), (False, [1 + held])]
        assert cost.reductions == (2 if every == 1 else 1.5)


def test_objectives_declare_what_they_do_not_train(tiny_run: Path):
    spec = NetworkSpec(path=str(tiny_run / "export"))
    assert not AntidoteModule(spec).cost().optimizer
    assert SOMFModule(spec, safe=str(spec.path)).cost().copies == 4, (
        "the reference, theta_safe, tau, fused weights"
    )
