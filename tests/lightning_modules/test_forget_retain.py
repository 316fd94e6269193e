"""The collapse guard of unlearning: its running mean, when it stops a run, and that it changes no
weight.
"""

from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from lightning_modules.forget_retain import CollapseGuard
from temper.losses.unlearning import RETAIN
from tests.objectives import fit
from tests.unlearning import (
    batches,
    module_of,
    one_step,
    other_network,
    plain_part,
    unlearning_data,
)


@pytest.mark.parametrize("retain", RETAIN)
@pytest.mark.parametrize("size", [None, 3])
def test_the_guard_starts_at_the_retain_nll(retain: str, size: int | None):
    module = module_of("ga", retain, collapse_factor=3.0, micro_batch_size=size)
    one_step(module, batches(), other_network(module.network))
    assert float(module.guard.start) == pytest.approx(plain_part("retain", "nll")[0], rel=1e-6)
    assert module.work.forwards == (0 if retain in ("nll", "bounded") else 1)


def test_the_guard_changes_no_weight():
    runs = []
    for factor in (None, 100.0):
        module = module_of("npo", "kl", collapse_factor=factor, double=False)
        fit(module, unlearning_data(batch_size=4, retain_batch_size=4), 3)
        runs.append([p.detach() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("retain", ["none", "embedding"])
def test_a_collapse_stops_the_run_and_says_how_to_go_on(retain: str):
    module = module_of(
        "ga", retain, alpha=1e-9, collapse_factor=2.0, optimizer=partial(torch.optim.AdamW, lr=0.05)
    )
    message = (
        r"collapse: the retain NLL went from [\d.]+ to [\d.]+ nats per token \(step \d+\), over"
        r" model\.init_args\.collapse_factor=2 .*"
        "Lower the learning rate or gamma, raise alpha.*null switches this off"
    )
    with pytest.raises(RuntimeError, match=message):
        fit(module, unlearning_data(), 100)
    assert module.global_step < 60


def test_a_healthy_run_is_left_alone():
    module = module_of(
        "bounded", "nll", collapse_factor=1.2, optimizer=partial(torch.optim.AdamW, lr=0.01)
    )
    assert fit(module, unlearning_data(), 30).global_step == 30
    assert float(module.guard.running) < float(module.guard.start)


def test_the_running_mean_ignores_non_finite_values():
    guard = CollapseGuard(2.0)
    running = 1.0
    for value in (1.0, 3.0, float("nan"), float("inf"), 2.0):
        guard.update(torch.tensor(value))
        guard.check(0)
        running = running if value - value != 0 else running + 0.1 * (value - running)
        assert float(guard.running) == pytest.approx(running)
    late = CollapseGuard(2.0)
    for value in (float("nan"), 1.0):
        late.update(torch.tensor(value))
    assert (float(late.start), float(late.running)) == (1.0, 1.0)


def test_a_multiple_of_a_tiny_nll_is_no_collapse():
    guard = CollapseGuard(3.0)
    guard.update(torch.tensor(0.001))
    for _ in range(100):
        guard.update(torch.tensor(0.29))
        guard.check(0)
    with pytest.raises(RuntimeError, match="went from 0.001 to"):
        for _ in range(100):
            guard.update(torch.tensor(0.31))
            guard.check(7)


def test_the_guards_update_waits_for_no_number():
    with FakeTensorMode():  # such tensors have no values, and reading one raises
        guard = CollapseGuard(3.0)
        for _ in range(3):
            guard.update(torch.ones(()))
        with pytest.raises(DataDependentOutputException):
            float(guard.running)
