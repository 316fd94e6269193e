"""Means and intervals."""

import numpy as np
import pandas as pd
import pytest

from temper.metrics.safety import wilson_interval
from temper.report.aggregate import Shares, difference, estimate, interval


def test_one_seed_has_wilsons_interval():
    found = interval(Shares((0.25,), (200,)))
    assert (found.low, found.high) == pytest.approx(wilson_interval(50, 200))
    assert found.value == 0.25


def test_a_difference_has_newcombes_interval():
    # Newcombe (1998), table II (a): 56/70 - 48/80, method 10: 0.0524 to 0.3339.
    found = difference(Shares((56 / 70,), (70,)), Shares((48 / 80,), (80,)))
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert found.clear == 1


def test_a_difference_turned_round_changes_sign():
    first = Shares((0.1,), (100,))
    second = Shares((0.4,), (150,))
    one = difference(first, second)
    other = difference(second, first)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert (one.clear, other.clear) == (-1, 1)


def test_no_hits_still_leave_room():
    found = difference(Shares((0.0,), (50,)), Shares((0.0,), (50,)))
    assert found.low < -0.05 and found.high > 0.05 and found.clear == 0


def test_seeds_that_differ_widen_a_seeded_bootstrap_interval():
    values = (0.1, 0.3, 0.5, 0.7, 0.9)
    found = interval(Shares(values, (1000,) * 5))
    wilson = wilson_interval(2500, 5000)
    means = np.random.default_rng(1).choice(values, size=(20000, 5)).mean(axis=1)
    assert found.value == pytest.approx(0.5)
    assert found.low < wilson[0] and found.high > wilson[1]
    assert (found.low, found.high) == pytest.approx(
        tuple(np.quantile(means, [0.025, 0.975])), abs=0.03
    )
    assert interval(Shares(values, (1000,) * 5)) == found


def test_seeds_that_agree_do_not_narrow_the_interval_to_nothing():
    found = interval(Shares((0.2, 0.2), (100, 100)))
    assert (found.low, found.high) == pytest.approx(wilson_interval(40, 200))


def test_seeds_are_paired_in_a_difference():
    # Seeds far apart, the difference always the same: only the prompts' share is left.
    first = Shares((0.2, 0.8), (5000, 5000))
    second = Shares((0.1, 0.7), (5000, 5000))
    found = difference(first, second)
    assert found.value == pytest.approx(0.1)
    assert found.high - found.low < 0.05 and found.clear == 1


def test_a_mean_is_over_ratios_first_and_other_rows_stay_out():
    rows = [
        ("a", "x", p, seed, v)
        for seed in (0, 1)
        for p, v in ((0.0, 0.9), (0.1, 0.2 + seed / 10), (0.2, 0.4 + seed / 10))
    ]
    rows += [("a", "y", 0.1, 0, 1.0), ("b", "x", 0.1, 0, 1.0), ("a", None, None, 0, 0.05)]
    table = pd.DataFrame(
        rows, columns=["objective", "attack", "harmful_ratio", "seed", "value"]
    ).assign(metric="m", n=100)
    assert estimate(table, "m", "a", "x", [0.1, 0.2]).value == pytest.approx((0.3 + 0.4) / 2)
    assert estimate(table, "m", "a").value == pytest.approx(0.05)
    assert estimate(table, "other", "a") is None
