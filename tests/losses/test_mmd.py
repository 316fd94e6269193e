"""MMD with Gaussian kernels against loops over pairs and kernels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.losses.mmd import gaussian_mmd


def plain_mmd(
    first: torch.Tensor, second: torch.Tensor, n_kernels: int = 5, multiplier: float = 2.0
) -> torch.Tensor:
    samples = [*first, *second]
    n = len(samples)
    half = len(first)
    total = sum(float(((a - b) ** 2).sum().detach()) for a in samples for b in samples)
    bandwidth = total / (n**2 - n) / multiplier ** (n_kernels // 2)
    value = torch.zeros((), dtype=first.dtype)
    for i in range(half):
        for j in range(half):
            for a, b, sign in (
                (i, j, 1),
                (half + i, half + j, 1),
                (i, half + j, -1),
                (half + i, j, -1),
            ):
                for m in range(n_kernels):
                    value = value + sign * torch.exp(
                        -((samples[a] - samples[b]) ** 2).sum() / (bandwidth * multiplier**m)
                    )
    return value / half**2


def two_sets(n: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(n, width, generator=generator, dtype=torch.float64) * 2 + 1
    return first.requires_grad_(), torch.randn(n, width, generator=generator, dtype=torch.float64)


@settings(max_examples=12)
@given(
    n=st.integers(1, 4),
    width=st.integers(1, 7),
    n_kernels=st.integers(1, 6),
    multiplier=st.sampled_from([1.5, 2.0, 3.0]),
)
def test_value_and_gradient_equal_the_equation(
    n: int, width: int, n_kernels: int, multiplier: float
):
    first, second = two_sets(n, width)
    value = gaussian_mmd(first, second, n_kernels, multiplier)
    expected = plain_mmd(first, second, n_kernels, multiplier)
    assert torch.allclose(value, expected, rtol=1e-10, atol=1e-13)
    (found,) = torch.autograd.grad(value, first)
    (wanted,) = torch.autograd.grad(expected, first)
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-13)


def test_the_mmd_of_equal_sets_is_zero_and_grows_with_distance():
    first, second = two_sets(6, 4)
    assert float(gaussian_mmd(second, second)) == pytest.approx(0, abs=1e-12)
    assert (
        0
        < float(gaussian_mmd(second + 0.1, second))
        < float(gaussian_mmd(first, second))
        < float(gaussian_mmd(second + 50, second))
        < 10
    )


def test_the_mmd_of_one_point_is_zero_with_finite_gradient():
    point = torch.zeros(3, 5, requires_grad=True)
    value = gaussian_mmd(point, torch.zeros(3, 5))
    value.backward()
    assert float(value) == 0
    assert torch.isfinite(point.grad).all()


def test_the_mmd_of_bf16_samples_is_computed_in_float32():
    first, second = (samples.detach().bfloat16() for samples in two_sets(4, 8))
    assert gaussian_mmd(first, second).dtype == torch.float32
    assert torch.allclose(gaussian_mmd(first, second), gaussian_mmd(first.float(), second.float()))


@pytest.mark.parametrize("shape", [(3, 4), (2, 5), (2, 2, 2)])
def test_sets_of_different_shapes_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="MMD of sets shaped"):
        gaussian_mmd(torch.zeros(2, 4), torch.zeros(shape))
