"""Means and 95 % intervals over harmful ratios and seeds.

One seed: a mean over ratios is a mean over the prompts of each prompt's mean, whose variance is at
most ``m (1 - m) / n``; Wilson's interval with ``n`` prompts therefore covers it even though the
same prompts recur at every ratio. Differences use Newcombe's interval (1998, method 10), which is
built from Wilson's bounds. Several seeds: a bootstrap over seeds, widened to include the same
intervals over the pooled answers, because a handful of seeds alone would make it far too narrow.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from temper.metrics.safety import wilson_interval

RESAMPLES = 2000
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A proportion in [0, 1], or a difference of two in [-1, 1], with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> int:
        """Sign of a difference whose interval excludes 0; otherwise 0."""
        if self.low > 0:
            return 1
        return -1 if self.high < 0 else 0


@dataclass(frozen=True)
class Shares:
    """One proportion per seed, each over ``n`` answers to as many prompts."""

    values: tuple[float, ...]
    n: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self.values))


def percent(share: float) -> str:
    """A proportion in %, as all tables write it: ``23.1``."""
    return f"{100 * share:.1f}"


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
        metric: Key of the metric (`temper.metrics.table`).
        objective: Key of the objective, or ``base``.
        attack: Key of the attack; None is before any attack.
        ratios: Harmful ratios to average over; None: all rows, as before an attack.
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
        values=tuple(float(value) for value in by_seed["value"].mean()),
        n=tuple(int(n) for n in by_seed["n"].min()),
    )


def interval(measured: Shares) -> Estimate:
    """Mean over seeds with its interval."""
    low, high = _wilson(measured)
    if len(measured.values) > 1:
        boot_low, boot_high = _bootstrap(measured.values)
        low = min(low, boot_low)
        high = max(high, boot_high)
    return Estimate(measured.mean, low, high)


def difference(first: Shares, second: Shares) -> Estimate:
    """``first - second`` with its interval; seeds are paired."""
    a = first.mean
    b = second.mean
    a_low, a_high = _wilson(first)
    b_low, b_high = _wilson(second)
    low = a - b - math.hypot(a - a_low, b_high - b)
    high = a - b + math.hypot(a_high - a, b - b_low)
    if len(first.values) > 1 and len(first.values) == len(second.values):
        differences = [x - y for x, y in zip(first.values, second.values, strict=True)]
        boot_low, boot_high = _bootstrap(differences)
        low = min(low, boot_low)
        high = max(high, boot_high)
    return Estimate(a - b, low, high)


def estimate(
    results: pd.DataFrame,
    metric: str,
    objective: str,
    attack: str | None = None,
    ratios: Sequence[float] | None = None,
) -> Estimate | None:
    """Mean over seeds of a metric with its interval; arguments as in `shares`."""
    measured = shares(results, metric, objective, attack, ratios)
    return None if measured is None else interval(measured)


def mean_cost(
    costs: pd.DataFrame, name: str, objective: str, stage: str = "aligned"
) -> float | None:
    """Mean over seeds (and attacks) of a cost of an objective; None where it was not measured.

    Args:
        costs: A tidy table with ``cost/*`` rows.
        name: Which cost, such as ``tokens``.
        objective: Key of the objective.
        stage: ``aligned``, or ``attacked``, which includes repairs.
    """
    rows = costs[
        (costs["metric"] == f"cost/{name}")
        & (costs["objective"] == objective)
        & (costs["stage"] == stage)
    ]
    return None if rows.empty else float(rows["value"].mean())


def _wilson(measured: Shares) -> tuple[float, float]:
    """Wilson's interval over the pooled answers of all seeds; it also holds for the fractional hits
    of a mean.
    """
    n = sum(measured.n)
    return wilson_interval(measured.mean * n, n)


def _bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Percentile interval of the mean; seeded, so that two reports of a study are the same."""
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    means = rng.choice(np.asarray(values), size=(RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
