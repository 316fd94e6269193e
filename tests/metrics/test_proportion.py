"""A share of cases and its Wilson interval."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from temper.metrics import Proportion, wilson_interval

CASES = st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def test_four_of_59_is_between_2_7_and_16_2_percent():
    low, high = wilson_interval(4, 59)
    assert (round(100 * low, 1), round(100 * high, 1)) == (2.7, 16.2)


def test_ends_solve_the_score_equation():
    hits = 13
    n = 40
    z = 1.959963984540054
    for bound in wilson_interval(hits, n):
        assert abs(hits / n - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n))


@pytest.mark.parametrize("n", [1, 7, 200])
def test_no_hits_begin_at_0_and_all_hits_end_at_1(n):
    assert wilson_interval(0, n)[0] == 0.0
    assert wilson_interval(n, n)[1] == 1.0
    assert 0.0 < wilson_interval(0, n)[1] < 1.0
    assert 0.0 < wilson_interval(n, n)[0] < 1.0


def test_without_cases_nothing_is_known():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@given(case=CASES)
def test_an_interval_lies_in_0_and_1_and_contains_the_share(case):
    hits, n = case
    low, high = wilson_interval(hits, n)
    assert 0.0 <= low <= hits / n <= high <= 1.0
    assert low < high


@given(case=CASES)
def test_hits_and_misses_mirror_each_other(case):
    hits, n = case
    low, high = wilson_interval(hits, n)
    assert (1 - high, 1 - low) == pytest.approx(wilson_interval(n - hits, n), abs=1e-9)


@given(case=CASES)
def test_cases_narrow_and_confidence_widens_the_interval(case):
    hits, n = case
    low, high = wilson_interval(hits, n)
    narrow = wilson_interval(10 * hits, 10 * n)
    wide = wilson_interval(hits, n, z=2.6)
    assert narrow[1] - narrow[0] < high - low < wide[1] - wide[0]


def test_flags_add_up_over_batches_of_any_shape():
    share = Proportion()
    share.update(torch.tensor([True, False, True]))
    share.update(torch.tensor([[False, False], [True, False]]))
    share.update(torch.zeros(0, dtype=torch.bool))
    low, high = wilson_interval(3, 7)
    assert share.compute() == {"value": 3 / 7, "ci_low": low, "ci_high": high, "n": 7}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_without_cases_the_share_is_nan_and_interval_is_0_to_1():
    found = Proportion().compute()
    assert math.isnan(found["value"])
    assert (found["ci_low"], found["ci_high"], found["n"]) == (0.0, 1.0, 0)


def test_a_reset_forgets():
    share = Proportion()
    share.update(torch.tensor([True]))
    share.compute()
    share.reset()
    share.update(torch.tensor([False]))
    assert (share.compute()["value"], share.compute()["n"]) == (0.0, 1)


def test_shares_of_two_ranks_are_summed_as_counts():
    one = Proportion()
    two = Proportion()
    one.update(torch.tensor([True]))
    two.update(torch.tensor([False, False, True]))
    one.merge_state(two)
    assert (one.compute()["value"], one.compute()["n"]) == (0.5, 4)
    assert set(one._reductions) == {"hits", "cases"}
    assert all(
        reduction is not None and reduction(torch.tensor([2, 3])) == 5
        for reduction in one._reductions.values()
    )
