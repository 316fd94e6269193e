"""Memorisation of single answers, against plain loops in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from temper.metrics.memorisation import (
    answer_probability,
    closer_to_one,
    exact_memorisation,
    extraction_strength,
    log_truth_ratio,
    longest_common_subsequence,
    min_k_score,
    rouge_l_recall,
    truth_preferred,
    without_end,
)
from temper.metrics.unlearning import has_truth_ratio
from tests.metrics.answers import SEEDS, K, N, random_answers, unmasked


@pytest.mark.parametrize("seed", range(4))
def test_row_metrics_match_a_loop_over_tokens(seed):
    logps, hits, mask = random_answers(seed)
    for k in range(K):
        answers = unmasked(logps[:, k], mask[:, k])
        right = unmasked(hits[:, k], mask[:, k])
        found = {
            "probability": answer_probability(logps[:, k], mask[:, k]),
            "em": exact_memorisation(hits[:, k], mask[:, k]),
            "es": extraction_strength(hits[:, k], mask[:, k]),
            "min_k": min_k_score(logps[:, k], mask[:, k], 0.4),
        }
        for row, (answer, flags) in enumerate(zip(answers, right, strict=True)):
            if not answer:
                assert math.isnan(found["probability"][row]) and math.isnan(found["em"][row])
                continue
            product = 1.0
            for logp in answer:
                product *= math.exp(logp)
            needed = next(given for given in range(len(flags) + 1) if all(flags[given:]))
            lowest = sorted(answer)[: max(1, int(len(answer) * 0.4))]
            assert float(found["probability"][row]) == pytest.approx(
                product ** (1 / len(answer)), rel=1e-10
            )
            assert float(found["em"][row]) == pytest.approx(sum(flags) / len(flags), rel=1e-6)
            assert float(found["es"][row]) == pytest.approx(1 - needed / len(flags), rel=1e-6)
            assert float(found["min_k"][row]) == pytest.approx(sum(lowest) / len(lowest), rel=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_truth_ratio_is_geometric_mean_of_wrong_over_right(seed):
    logps, _, mask = random_answers(seed)
    found = log_truth_ratio(logps, mask).exp()
    n_compared = 0
    for row in range(N):
        right, *wrong = unmasked(logps[row], mask[row])
        wrong = [answer for answer in wrong if answer]
        if not right or not wrong:
            assert math.isnan(found[row])
            continue
        normalised = [
            math.prod(math.exp(logp) for logp in answer) ** (1 / len(answer))
            for answer in [right, *wrong]
        ]
        assert float(found[row]) == pytest.approx(
            math.prod(normalised[1:]) ** (1 / len(wrong)) / normalised[0], rel=1e-10
        )
        n_compared += 1
    assert n_compared >= N // 2


@pytest.mark.parametrize(("paraphrased", "forget"), [(None, 0.073), (True, 0.509), (False, 0.073)])
def test_the_paraphrase_is_the_right_answer_where_there_is_one(paraphrased, forget):
    """A memorised answer beside a paraphrase that is hardly likelier than the wrong ones: the
    trained answer would make a forgetful model look as if it knew (0.073 instead of 0.509).
    """
    wrong = -2.0
    means = [wrong - math.log(0.073), wrong - math.log(0.509), wrong - 0.5, wrong + 0.5]
    if not paraphrased:
        means[1] = wrong  # one more perturbed answer
    logps = torch.tensor([[[mean] * 3 for mean in means]], dtype=torch.float64)
    mask = torch.ones(1, 4, 3, dtype=torch.bool)
    flags = None if paraphrased is None else torch.tensor([paraphrased])
    found = closer_to_one(log_truth_ratio(logps, mask, flags))
    assert float(found) == pytest.approx(forget, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_truth_ratios_with_some_paraphrases_match_loops(seed):
    logps, _, mask = random_answers(seed)
    flags = torch.arange(N) % 2 == 1
    found = log_truth_ratio(logps, mask, flags)
    counted = has_truth_ratio(mask, flags)
    for row in range(N):
        first = int(flags[row])
        right, *wrong = unmasked(logps[row], mask[row])[first:]
        wrong = [answer for answer in wrong if answer]
        assert bool(counted[row]) == bool(right and wrong)
        if right and wrong:
            means = [sum(answer) / len(answer) for answer in wrong]
            assert float(found[row]) == pytest.approx(
                sum(means) / len(means) - sum(right) / len(right), rel=1e-10
            )
    assert counted.any()


@pytest.mark.parametrize(
    ("ratio", "forget", "retain"),
    [(1.0, 1.0, 0.0), (0.25, 0.25, 0.75), (4.0, 0.25, 0.0), (1e-300, 0.0, 1.0)],
)
def test_truth_ratio_is_best_at_1_to_forget_and_0_to_retain(ratio, forget, retain):
    log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64)
    assert float(closer_to_one(log_ratio)) == pytest.approx(forget, abs=1e-12)
    assert float(truth_preferred(log_ratio)) == pytest.approx(retain, abs=1e-12)


def test_unlikely_answers_keep_their_truth_ratio():
    logps = torch.tensor(
        [[[-40.0] * 4, [-41.0] * 4]], dtype=torch.float64
    )  # exp(-40) is far below the 1e-10 of open-unlearning
    assert float(log_truth_ratio(logps, torch.ones(1, 2, 4, dtype=torch.bool))) == pytest.approx(
        -1.0
    )


@pytest.mark.parametrize(
    ("share", "n", "taken"),
    [(0.2, 1, 1), (0.2, 9, 1), (0.2, 10, 2), (0.29, 100, 29), (0.1, 30, 3), (1.0, 7, 7)],
)
def test_min_k_rounds_down_and_takes_at_least_one_token(share, n, taken):
    logps = -torch.arange(1, n + 1, dtype=torch.float64)
    expected = -sum(range(n - taken + 1, n + 1)) / taken
    assert float(
        min_k_score(logps[None], torch.ones(1, n, dtype=torch.bool), share)
    ) == pytest.approx(expected, rel=1e-12)


def test_the_end_token_is_the_last_labelled_one():
    mask = torch.tensor(
        [[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool
    )
    expected = torch.tensor(
        [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool
    )
    assert torch.equal(without_end(mask), expected)


@pytest.mark.parametrize(
    ("flags", "strength", "share"),
    [("1111", 1, 1), ("0000", 0, 0), ("0111", 0.75, 0.75), ("1110", 0, 0.75), ("1011", 0.5, 0.75)],
)
def test_extraction_strength_alone_counts_from_the_end(flags, strength, share):
    hits = torch.tensor([[c == "1" for c in flags]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert float(extraction_strength(hits, mask)) == strength
    assert float(exact_memorisation(hits, mask)) == share


@given(
    first=st.lists(st.integers(0, 3), max_size=12), second=st.lists(st.integers(0, 3), max_size=12)
)
def test_longest_common_subsequence_matches_dynamic_programming(first, second):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
            )
    assert longest_common_subsequence(first, second) == table[-1][-1]
    assert (
        rouge_l_recall(second, first) == pytest.approx(table[-1][-1] / len(first))
        if first
        else math.isnan(rouge_l_recall(second, first))
    )


def test_rouge_recall_divides_by_the_length_of_the_truth():
    assert rouge_l_recall([9, 1, 9, 2, 9, 3], [1, 2, 3, 4]) == 0.75
    assert rouge_l_recall([], [1, 2]) == 0.0


@given(seed=SEEDS, width=st.integers(1, 5))
def test_padding_changes_nothing(seed, width):
    logps, hits, mask = random_answers(seed)
    wide = [
        torch.nn.functional.pad(value, (width, width), value=fill)
        for value, fill in ((logps, math.nan), (hits, True), (mask, False))
    ]
    for function in (answer_probability, lambda p, m: min_k_score(p, m, 0.3), log_truth_ratio):
        assert torch.allclose(
            function(wide[0], wide[2]), function(logps, mask), rtol=1e-13, atol=0, equal_nan=True
        )
    for function in (exact_memorisation, extraction_strength):
        assert torch.equal(
            function(wide[1], wide[2]).nan_to_num(7.0), function(hits, mask).nan_to_num(7.0)
        )
    assert torch.equal(without_end(wide[2])[..., width:-width], without_end(mask))
