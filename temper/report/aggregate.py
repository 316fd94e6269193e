"""Means and 95 % intervals over harmful ratios and seeds.

One seed: a mean over ratios is a mean over the prompts of each prompt's mean, whose variance is at
most ``m (1 - m) / n``; Wilson's interval with ``n`` prompts therefore covers it even though the
same prompts recur at every ratio. Differences use Newcombe's interval (1998, method 10), which
Wilson's bounds make. Several seeds: a bootstrap over seeds, joined with the same intervals over
the pooled answers, because a handful of seeds alone would make it far too narrow.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from temper.metrics.safety import wilson_interval

DRAWS = 2000
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; a difference of proportions lies in [-1, 1]."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> int:
        """Sign of a difference whose interval leaves 0 out; else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


@dataclass(frozen=True)
class Shares:
    """One proportion per seed, each over ``n`` answers to as many prompts."""

    values: tuple[float, ...]
    n: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self.values))


def shares(
    results: pd.DataFrame,
    metric: str,
    objective: str,
    attack: str | None = None,
    ratios: Sequence[float] | None = None,
) -> Shares | None:
    """A metric of one objective, per seed; None where it was not measured.

    Args:
        results: The tidy table.
        metric: Its name there.
        objective: Key of the objective, or ``base``.
        attack: Key of the attack; None is before any.
        ratios: Harmful ratios to take the mean over; None means that there are none to tell apart.
    """
    mask = (results["metric"] == metric) & (results["objective"] == objective)
    mask &= results["attack"].isna() if attack is None else results["attack"] == attack
    if ratios is not None:
        mask &= results["harmful_ratio"].isin(list(ratios))
    rows = results[mask & results["value"].notna()]
    if rows.empty:
        return None
    by_seed = rows.groupby("seed", sort=True)
    return Shares(
        tuple(float(v) for v in by_seed["value"].mean()), tuple(int(n) for n in by_seed["n"].min())
    )


def interval(measured: Shares) -> Estimate:
    """Mean over seeds with its interval."""
    low, high = _wilson(measured)
    if len(measured.values) > 1:
        boot_low, boot_high = _bootstrap(measured.values)
        low, high = min(low, boot_low), max(high, boot_high)
    return Estimate(measured.mean, low, high)


def difference(first: Shares, second: Shares) -> Estimate:
    """``first - second`` with its interval; seeds are paired."""
    a, b = first.mean, second.mean
    (a_low, a_high), (b_low, b_high) = _wilson(first), _wilson(second)
    low, high = a - b - math.hypot(a - a_low, b_high - b), a - b + math.hypot(a_high - a, b - b_low)
    if len(first.values) > 1 and len(first.values) == len(second.values):
        boot_low, boot_high = _bootstrap(
            [x - y for x, y in zip(first.values, second.values, strict=True)]
        )
        low, high = min(low, boot_low), max(high, boot_high)
    return Estimate(a - b, low, high)


def estimate(
    results: pd.DataFrame,
    metric: str,
    objective: str,
    attack: str | None = None,
    ratios: Sequence[float] | None = None,
) -> Estimate | None:
    """As [shares][temper.report.aggregate.shares], as a mean with its interval."""
    measured = shares(results, metric, objective, attack, ratios)
    return None if measured is None else interval(measured)


def mean_cost(
    costs: pd.DataFrame, name: str, objective: str, stage: str = "aligned"
) -> float | None:
    """Mean over seeds (and attacks) of a cost of an objective's stage: ``aligned``, or ``attacked``
    with repairs.
    """
    rows = costs[
        (costs["metric"] == f"cost/{name}")
        & (costs["objective"] == objective)
        & (costs["stage"] == stage)
    ]
    return None if rows.empty else float(rows["value"].mean())


def _wilson(measured: Shares) -> tuple[float, float]:
    """Wilson over the pooled answers of all seeds; the formula holds for the fractional hits of a
    mean.
    """
    n = sum(measured.n)
    return wilson_interval(measured.mean * n, n)


def _bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Percentile interval of the mean; seeded, so that a report is the same twice."""
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    means = rng.choice(np.asarray(values), size=(DRAWS, len(values))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
