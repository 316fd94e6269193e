"""The two-sample Kolmogorov-Smirnov test, against scipy and by enumeration."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from temper.metrics.kolmogorov import ks_p_value, ks_two_sample


def _sequence(n: int, factor: int, offset: int) -> Tensor:
    i = torch.arange(1, n + 1)
    return (factor * i**2 + offset).remainder(1009).double() / 1009


# scipy 1.17.1, ks_2samp(first, second, method="exact").
SCIPY = [
    (torch.tensor([1.0, 2, 3, 4]), torch.tensor([5.0, 6, 7, 8, 9]), 1.0, 0.015873015873015872),
    (torch.tensor([0.1, 0.4, 0.7]), torch.tensor([0.2, 0.3, 0.9]), 0.3333333333333333, 1.0),
    (_sequence(40, 7, 3), _sequence(40, 11, 5) + 0.2, 0.375, 0.006760732303569208),
    (_sequence(30, 7, 3), _sequence(50, 11, 5) ** 2, 0.29333333333333333, 0.06588776654608955),
    (_sequence(200, 7, 3), _sequence(200, 11, 5) + 0.5, 0.555, 1.1184855575660152e-28),
    (_sequence(400, 7, 3), _sequence(100, 11, 5) * 1.3, 0.23, 0.0003621711208189142),
    (_sequence(10, 7, 3), _sequence(10, 7, 3), 0.0, 1.0),
    (torch.tensor([1.0, 2, 2, 3, 3, 3]), torch.tensor([2.0, 3, 3, 4]), 0.25, 0.9952380952380953),
    (torch.arange(100), torch.arange(100, 220), 1.0, 5.4671118044827636e-65),
    (_sequence(12, 7, 3), _sequence(1, 11, 5), 0.8333333333333334, 0.46153846153846156),
]


@pytest.mark.parametrize(("first", "second", "statistic", "p_value"), SCIPY)
def test_statistic_and_p_value_are_those_of_scipy(first, second, statistic, p_value):
    for one, two in ((first, second), (second, first)):
        found = ks_two_sample(one, two)
        assert found.statistic == pytest.approx(statistic, rel=1e-14)
        assert found.p_value == pytest.approx(p_value, rel=1e-11)


@given(m=st.integers(1, 5), n=st.integers(1, 5), distance=st.integers(0, 26))
def test_ks_p_value_matches_enumeration_of_all_orders(m, n, distance):
    def paths(i: int, j: int, out: bool) -> tuple[int, int]:
        out = out or abs(i * n - j * m) >= distance
        if (i, j) == (m, n):
            return int(out), 1
        steps = ([paths(i + 1, j, out)] if i < m else []) + (
            [paths(i, j + 1, out)] if j < n else []
        )
        return sum(s[0] for s in steps), sum(s[1] for s in steps)

    outside, everything = paths(0, 0, False)
    assert ks_p_value(distance, m, n) == pytest.approx(outside / everything, rel=1e-13)


def test_a_monotone_change_of_both_samples_changes_nothing():
    first = _sequence(50, 7, 3) - 0.5
    second = _sequence(60, 11, 5) ** 2
    assert (
        ks_two_sample(first, second)
        == ks_two_sample(first.exp(), second.exp())
        == ks_two_sample((-first).exp(), (-second).exp())
    )


def test_without_a_sample_or_with_a_nan_nothing_is_known():
    for sample in (torch.tensor([]), torch.tensor([0.5, math.nan])):
        assert math.isnan(ks_two_sample(torch.tensor([1.0]), sample).p_value)
