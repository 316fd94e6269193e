"""Rows of DeRTa: what is fed, what is labelled, and how long the prefixes are."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from temper.data.derta import prefix_lengths, prefix_rows, rto_rows

PAD = 0
REFUSAL = 6
SORRY = 7
END = 2
Rows = list[list[int]]

prompts_and_answers = st.lists(
    st.tuples(
        st.lists(st.integers(10, 19), min_size=1, max_size=4),
        st.lists(st.integers(20, 29), min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=8,
)


def padded(rows: Rows) -> np.ndarray:
    width = max(map(len, rows))
    return np.array([row + [-1] * (width - len(row)) for row in rows])


def arrays(drawn: list[tuple[list[int], list[int]]]) -> tuple[Rows, Rows]:
    return [prompt for prompt, _ in drawn], [answer + [END] for _, answer in drawn]


def unpadded(rows: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of every row without its padding, after checking that padding is padding."""
    result = []
    for ids, present, labels in zip(
        rows["input_ids"].tolist(),
        rows["attention_mask"].tolist(),
        rows["labels"].tolist(),
        strict=True,
    ):
        size = sum(present)
        assert present == [1] * size + [0] * (len(ids) - size)
        assert set(ids[size:]) <= {PAD} and set(labels[size:]) <= {-100}
        result.append((ids[:size], labels[:size]))
    return result


@given(drawn=prompts_and_answers, seed=st.integers(0, 5))
def test_a_prefix_row_has_labels_on_the_refusal_alone(drawn: list, seed: int):
    prompts, answers = arrays(drawn)
    k = prefix_lengths(padded(answers), np.random.default_rng(seed))
    refusals = [[REFUSAL, SORRY, END] if i % 2 else [REFUSAL, END] for i in range(len(prompts))]
    rows = unpadded(prefix_rows(padded(prompts), padded(answers), padded(refusals), k, PAD))
    for (ids, labels), prompt, answer, refusal, n in zip(
        rows, prompts, answers, refusals, k.tolist(), strict=True
    ):
        assert ids == prompt + answer[:n] + refusal
        assert labels == [-100] * (len(prompt) + n) + refusal
        assert END not in answer[:n]


@given(drawn=prompts_and_answers, seed=st.integers(0, 5))
def test_a_third_of_the_prefixes_is_empty_and_none_ends(drawn: list, seed: int):
    answers = arrays(drawn)[1]
    k = prefix_lengths(padded(answers), np.random.default_rng(seed))
    assert (k == 0).sum() == round(len(answers) / 3)
    assert all(0 <= n <= len(answer) - 1 for n, answer in zip(k, answers, strict=True))


def test_other_prefix_lengths_are_uniform():
    answers = padded([[20] * 4 + [END]] * 6000 + [[20] * 2 + [END]] * 3000)
    k = prefix_lengths(answers, np.random.default_rng(0))
    long = k[:6000]
    short = k[6000:]
    for kind, longest in ((long, 4), (short, 2)):
        counts = np.array([(kind == n).sum() for n in range(1, longest + 1)])
        expected = counts.sum() / longest
        assert (
            (counts - expected) ** 2 / expected
        ).sum() < 16  # chi-square, p of about 0.001 with 3 degrees
    assert (k == 0).sum() == 3000


def test_a_prefix_with_the_end_token_in_it_is_refused():
    prompts = padded([[10]])
    answers = padded([[20, END]])
    refusals = padded([[REFUSAL, END]])
    for k in (2, -1):
        with pytest.raises(ValueError, match="all but the end token"):
            prefix_rows(prompts, answers, refusals, np.array([k]), PAD)


@given(drawn=prompts_and_answers)
def test_an_rto_row_has_the_refusal_token_at_every_position(drawn: list):
    prompts, answers = arrays(drawn)
    rows = unpadded(
        rto_rows(padded(prompts), padded(answers), REFUSAL, PAD, np.random.default_rng(0))
    )
    for (ids, labels), prompt, answer in zip(rows, prompts, answers, strict=True):
        assert ids == prompt + answer
        assert labels == [-100] * len(prompt) + [REFUSAL] * len(answer)


@given(
    drawn=prompts_and_answers,
    keep=st.sampled_from([0.05, 0.3, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 5),
)
def test_exactly_the_given_share_of_positions_keeps_labels(drawn: list, keep: float, seed: int):
    prompts, answers = arrays(drawn)
    rows = unpadded(
        rto_rows(padded(prompts), padded(answers), REFUSAL, PAD, np.random.default_rng(seed), keep)
    )
    labels = [labels for _, labels in rows]
    n_positions = sum(map(len, answers))
    assert sum(label != -100 for row in labels for label in row) == max(
        1, round(keep * n_positions)
    )
    assert {label for row in labels for label in row} <= {-100, REFUSAL}
    assert all(
        set(row[: len(prompt)]) <= {-100} for row, prompt in zip(labels, prompts, strict=True)
    )


def test_kept_positions_are_drawn_from_all_of_them():
    prompts = padded([[10, 11]] * 4)
    answers = padded([[20, 21, 22, END]] * 4)
    seen = sum(
        (
            rto_rows(prompts, answers, REFUSAL, PAD, np.random.default_rng(seed), 0.25)["labels"]
            != -100
        ).int()
        for seed in range(60)
    )
    assert (seen[:, 2:] > 0).all()
