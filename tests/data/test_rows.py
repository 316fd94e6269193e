"""Rows of tokens: masks, trimming, selection, micro-batches, and counts of harmful rows."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from temper.data import fingerprint, make_rows, micro_batches, select, trim
from temper.data.rows import harmful_count
from temper.errors import TemperError
from temper.losses import IGNORE_INDEX

PAD_ID = 0
TOKENS = st.lists(st.integers(1, 50), max_size=6)


def _padded(rows: list[list[int]]) -> np.ndarray:
    width = max(map(len, rows)) + 1  # one column of padding in every row
    return np.array([row + [-1] * (width - len(row)) for row in rows])


@given(
    rows=st.lists(st.tuples(TOKENS.filter(bool), TOKENS.filter(bool)), min_size=1, max_size=6),
    train_on_prompt=st.booleans(),
)
def test_labels_are_the_response_and_nothing_else(rows, train_on_prompt):
    prompts = [p for p, _ in rows]
    responses = [r for _, r in rows]
    batch = make_rows(_padded(prompts), _padded(responses), PAD_ID, train_on_prompt)
    width = max(len(p) + len(r) for p, r in rows)
    for row, (prompt, response) in enumerate(rows):
        padding = width - len(prompt) - len(response)
        hidden = prompt if train_on_prompt else [IGNORE_INDEX] * len(prompt)
        assert batch["input_ids"][row].tolist() == prompt + response + [PAD_ID] * padding
        assert (
            batch["attention_mask"][row].tolist()
            == [1] * (len(prompt) + len(response)) + [0] * padding
        )
        assert batch["labels"][row].tolist() == hidden + response + [IGNORE_INDEX] * padding
    assert batch["ids"].tolist() == list(range(len(rows)))
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_a_token_that_looks_like_padding_keeps_its_label():
    batch = make_rows(np.array([[5, 6]]), np.array([[PAD_ID, 7]]), PAD_ID)
    assert batch["labels"].tolist() == [[IGNORE_INDEX, IGNORE_INDEX, PAD_ID, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1]]


def _batch() -> dict[str, torch.Tensor]:
    return make_rows(
        _padded([[1, 2], [3], [4, 5, 6]]), _padded([[7], [8, 9], [10, 11, 12]]), PAD_ID
    )


def test_selecting_takes_rows_of_every_tensor():
    batch = _batch()
    chosen = select(batch, torch.tensor([2, 0]))
    assert chosen["ids"].tolist() == [2, 0]
    assert all(torch.equal(chosen[name], batch[name][[2, 0]]) for name in batch)


def test_trimming_cuts_only_columns_without_a_token():
    batch = select(_batch(), slice(0, 2))
    short = trim(batch)
    assert short["input_ids"].tolist() == [[1, 2, 7], [3, 8, 9]]
    assert short["attention_mask"].shape == short["labels"].shape == (2, 3)
    assert short["ids"].tolist() == [0, 1]


def test_trimming_an_empty_batch_leaves_it_empty():
    assert trim(select(_batch(), slice(0, 0)))["input_ids"].shape == (0, 0)


@given(n_rows=st.integers(0, 12), size=st.one_of(st.none(), st.integers(1, 15)))
def test_micro_batches_hold_every_row_once_in_order(n_rows, size):
    batch = {"ids": torch.arange(n_rows), "input_ids": torch.arange(2 * n_rows).view(n_rows, 2)}
    pieces = list(micro_batches(batch, size))
    assert [i for piece in pieces for i in piece["ids"].tolist()] == list(range(n_rows))
    assert all(torch.equal(piece["input_ids"][:, 0], 2 * piece["ids"]) for piece in pieces)
    assert all(0 < len(piece["ids"]) <= (size or n_rows) for piece in pieces)
    assert len(pieces) == (-(-n_rows // size) if size else min(n_rows, 1))


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "labels", "ids"])
def test_a_fingerprint_changes_with_any_value_and_only_then(name):
    batch = _batch()
    changed = _batch()
    assert fingerprint(batch) == fingerprint(changed)
    changed[name][-1] += 1
    assert fingerprint(batch) != fingerprint(changed)
    assert len(fingerprint(batch)) == 64


def test_a_fingerprint_does_not_depend_on_memory_layout():
    batch = _batch()
    strided = {
        name: value.t().contiguous().t() if value.dim() == 2 else value
        for name, value in batch.items()
    }
    assert fingerprint(batch) == fingerprint(strided)


# -- counts of harmful rows


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
