"""The cosine of intended and actual displacement of low-precision weights, and its warning."""

import warnings

import pytest
import torch
from torch import nn

from strategies import Vector, WeightSpace
from tests.objectives import fit, make_data, make_module


def _space(size: int, dtype: torch.dtype = torch.bfloat16) -> tuple[WeightSpace, Vector]:
    """Weights as a language model has them (standard deviation 0.02), and a random direction of
    length 1.
    """
    torch.manual_seed(0)
    direction = torch.randn(size)
    parameter = nn.Parameter((torch.randn(size) * 0.02).to(dtype))
    return WeightSpace({"w": parameter}), Vector([direction / direction.norm()])


def _cosine(size: int, alpha: float, dtype: torch.dtype = torch.bfloat16) -> float:
    weights, direction = _space(size, dtype)
    before = weights.parameters[0].detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with weights.displaced(direction, -alpha):
            made = weights.parameters[0].detach().float() - before.float()
    plain = torch.nn.functional.cosine_similarity(
        made.double(), -alpha * direction.tensors[0].double(), dim=0
    )
    assert float(weights.displacement_cosine) == pytest.approx(float(plain), abs=1e-5)
    return float(plain)


def test_the_cosine_falls_with_weights_and_rises_with_alpha():
    by_size = [_cosine(size, 0.1) for size in (1_000, 30_000, 1_000_000, 10_000_000)]
    assert by_size == sorted(by_size, reverse=True)
    assert by_size[0] > 0.99 and by_size[-1] < 0.8
    by_alpha = [_cosine(1_000_000, alpha) for alpha in (0.01, 0.1, 1.0, 10.0)]
    assert by_alpha == sorted(by_alpha)
    assert by_alpha[0] < 0.5 and by_alpha[-1] > 0.99


def test_float32_weights_go_where_they_should():
    assert _cosine(1_000_000, 0.1, torch.float32) > 0.99999


def test_coarse_weights_are_warned_about_once():
    weights, direction = _space(1_000_000)
    with (
        pytest.warns(
            UserWarning,
            match=r"cosine 0\.\d{3} .*bfloat16 .*1,000,000\. .*LoRA.*network\.dtype=float32",
        ),
        weights.displaced(direction, 0.1),
    ):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with weights.displaced(direction, 0.001):
            pass


def test_weights_too_coarse_to_move_at_all_have_cosine_0():
    weights = WeightSpace({"w": nn.Parameter(torch.ones(4, dtype=torch.bfloat16))})
    direction = Vector([torch.full((4,), 0.5)])
    with pytest.warns(UserWarning, match=r"cosine 0\.000"), weights.displaced(direction, 1e-6):
        pass
    assert weights.displacement_cosine == 0


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_zero_or_nan_directions_are_not_measured(value):
    weights, direction = _space(100, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with weights.displaced(Vector([torch.full((100,), value)]), 0.1):
            pass
        assert weights.displacement_cosine is None
        with weights.displaced(direction, 0.1):
            pass
    assert weights.displacement_cosine > 0.99


def test_booster_logs_the_cosine():
    module = make_module(double=False)
    trainer = fit(module, make_data(), steps=2)
    assert trainer.callback_metrics["booster/displacement_cosine"] > 0.9999
