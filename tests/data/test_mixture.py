"""Exact counts of harmful rows, and what is said where there is none."""

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from temper.data.rows import harmful_count
from temper.errors import TemperError


@pytest.mark.parametrize(
    ("ratio", "n_rows", "count"),
    [
        (0, 400, 0),
        (0.05, 400, 20),
        (0.1, 400, 40),
        (0.15, 400, 60),
        (0.2, 400, 80),
        (1, 400, 400),
        (0.29, 100, 29),
        (1 / 3, 3, 1),
        (0.1, 30, 3),
    ],
)
def test_whole_products_are_exact_whatever_floats_make_of_them(ratio, n_rows, count):
    assert harmful_count(ratio, n_rows) == count


@given(n_rows=st.integers(1, 200_000), data=st.data())
def test_every_share_of_whole_rows_is_accepted(n_rows, data):
    count = data.draw(st.integers(0, n_rows))
    assert harmful_count(count / n_rows, n_rows) == count


@given(n_rows=st.integers(1, 100_000), ratio=st.floats(0, 1))
def test_a_count_is_exact_or_refused_with_a_valid_ratio(n_rows, ratio):
    exact = Fraction(ratio) * n_rows
    if abs(exact - round(exact)) > Fraction(n_rows, 10**9) * 2:
        with pytest.raises(TemperError) as caught:
            harmful_count(ratio, n_rows)
        suggested = re.search(
            r"rounded it would be (\d+) rows: set harmful_ratio=(\S+), or change n_rows",
            str(caught.value),
        )
        assert suggested
        assert harmful_count(float(suggested[2]), n_rows) == int(suggested[1])
        assert abs(int(suggested[1]) - exact) <= Fraction(1, 2) + Fraction(1, 10**6)
    elif abs(exact - round(exact)) < Fraction(n_rows, 10**9) / 2:
        assert harmful_count(ratio, n_rows) == round(exact)


def test_a_fractional_count_is_refused_with_two_ways_out():
    message = (
        r"data\.init_args\.harmful_ratio=0\.1: 0\.1 x 25 rows = 2\.5 is not a whole .*2 rows: set"
        r" harmful_ratio=0\.08, or change n_rows"
    )
    with pytest.raises(TemperError, match=message):
        harmful_count(0.1, 25)


@pytest.mark.parametrize("ratio", [-0.1, 1.01, 10, float("nan")])
def test_a_ratio_outside_0_and_1_is_refused(ratio):
    with pytest.raises(
        TemperError,
        match=(
            rf"data\.init_args\.harmful_ratio={ratio}: give a share in \[0, 1\], for example 0\.1"
            r" for 10 %"
        ),
    ):
        harmful_count(ratio, 100)


@pytest.mark.parametrize("n_rows", [0, -5])
def test_an_empty_set_is_refused(n_rows):
    with pytest.raises(
        TemperError, match=rf"data\.init_args\.n_rows={n_rows}: the set is empty; give at least 1"
    ):
        harmful_count(0.1, n_rows)
