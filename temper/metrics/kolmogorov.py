"""The two-sample Kolmogorov-Smirnov test, exact for samples of any size."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class KSTest(NamedTuple):
    """Largest distance between two empirical distribution functions, and its two-sided p-value."""

    statistic: float
    p_value: float


def ks_two_sample(first: Tensor, second: Tensor) -> KSTest:
    """Test whether two samples are drawn from one continuous distribution.

    ``D = max_x |F_1(x) - F_2(x)|``; ``p = P(D' >= D)`` over all orders of ``m + n`` different
    values, which are equally likely (Hodges 1957). A monotone function of both samples changes
    neither. The same as ``scipy.stats.ks_2samp(..., method="exact")``.

    Args:
        first: Sample of size m, any shape.
        second: Sample of size n, any shape.

    Returns:
        Statistic and p-value; NaN if a sample is empty or holds a NaN.
    """
    first = first.detach().cpu().double().flatten()
    second = second.detach().cpu().double().flatten()
    m = len(first)
    n = len(second)
    if m == 0 or n == 0 or bool(torch.cat([first, second]).isnan().any()):
        return KSTest(math.nan, math.nan)
    values = torch.cat([first, second])
    below_first = torch.searchsorted(first.sort().values, values, right=True)
    below_second = torch.searchsorted(second.sort().values, values, right=True)
    distance = int((below_first * n - below_second * m).abs().max())
    return KSTest(distance / (m * n), ks_p_value(distance, m, n))


def ks_p_value(distance: int, m: int, n: int) -> float:
    """``P(max |i n - j m| >= distance)`` over lattice paths from (0, 0) to (m, n), all equally
    likely.

    ``r(i, j)``, the probability that a path to (i, j) has already been that far out, is 1 where
    ``|i n - j m| >= distance`` and ``i/(i+j) r(i-1, j) + j/(i+j) r(i, j-1)`` elsewhere. All terms
    are positive, so a p-value of 1e-100 is as exact as one of 0.1, where one minus the distribution
    function would be 0. Computed diagonal by diagonal, in ``O(m n)``.

    Args:
        distance: ``D m n``, a whole number.
        m: Size of one sample.
        n: Size of the other.
    """
    i = torch.arange(m + 1)
    left = torch.zeros(m + 1, dtype=torch.float64)  # r(i, s - i) of the diagonal s
    left[0] = float(distance <= 0)
    for s in range(1, m + n + 1):
        j = s - i
        shifted = torch.cat([left.new_zeros(1), left[:-1]])
        inner = (i * shifted + j * left) / s
        left = torch.where((i * n - j * m).abs() >= distance, 1.0, inner)
        left[(j < 0) | (j > n)] = 0.0
    return min(1.0, float(left[m]))
