"""Learning rates step by step."""

import math

import pytest
import torch

from temper.schedules import WarmupCosine


def _rates(n_steps: int, **arguments: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosine(optimizer, **arguments)
    rates = []
    for _ in range(n_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_warm_up_rises_in_equal_steps_to_the_full_rate():
    assert _rates(5, total_steps=20, warmup_steps=4)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_a_half_cosine_falls_to_the_floor_and_holds():
    rates = _rates(16, total_steps=10, warmup_steps=2, final_ratio=0.1)
    for step in range(2, 10):
        assert rates[step] == pytest.approx(
            2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 8)))
        )
    assert rates[10:] == pytest.approx([0.2] * 6)


def test_a_final_ratio_of_1_keeps_the_rate_constant():
    assert _rates(8, total_steps=5, final_ratio=1.0) == pytest.approx([2.0] * 8)


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert _rates(1, total_steps=5) == [2.0]


def test_a_warm_up_as_long_as_the_run_never_divides_by_zero():
    assert _rates(6, total_steps=4, warmup_steps=4, final_ratio=0.5) == pytest.approx(
        [0.5, 1.0, 1.5, 2.0, 2.0, 1.0]
    )
