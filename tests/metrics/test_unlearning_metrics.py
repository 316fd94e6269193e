"""Unlearning metrics against plain loops in float64, on models that know everything and nothing,
and however rows are divided into batches and ranks.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from temper.losses import Scores
from temper.metrics import wilson_interval
from temper.metrics.kolmogorov import ks_p_value, ks_two_sample
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
from temper.metrics.table import UNLEARNING_METRICS
from temper.metrics.unlearning import (
    AnswerProbability,
    ExactMemorisation,
    ExtractionStrength,
    ForgetQuality,
    MembershipAUROC,
    RougeLRecall,
    TruthRatio,
    UnlearningMetrics,
    against_retain_model,
    harmonic_mean,
    privacy_leakage,
    sets_with_wrong_answers,
)

N = 13
K = 3
T = 9
SEEDS = st.integers(0, 10**6)
CUTS = st.lists(st.integers(0, N), max_size=4).map(sorted)


def _rows(seed: int, certainty: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """logps_NKT (float64 nats), hits_NKT and mask_NKT: answers of 0 to 7 tokens somewhere in the
    row; garbage where masked.
    """
    generator = torch.Generator().manual_seed(seed)
    logps = -certainty * torch.rand(N, K, T, generator=generator, dtype=torch.float64)
    hits = torch.rand(N, K, T, generator=generator) < 0.6
    start = torch.randint(0, 3, (N, K, 1), generator=generator)
    length = torch.randint(0, 8, (N, K, 1), generator=generator)
    mask = (torch.arange(T) >= start) & (torch.arange(T) < start + length)
    return torch.where(mask, logps, torch.nan), hits, mask


def _answers(values: Tensor, mask: Tensor) -> list[list[float]]:
    return [
        [float(v) for v, m in zip(row, kept, strict=True) if m]
        for row, kept in zip(values, mask, strict=True)
    ]


def _pieces(cuts: list[int]) -> Iterator[slice]:
    ends = [0, *cuts, N]
    return (slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True))


# -- formulas, written out


@pytest.mark.parametrize("seed", range(4))
def test_row_metrics_are_what_a_loop_over_tokens_gives(seed):
    logps, hits, mask = _rows(seed)
    for k in range(K):
        answers = _answers(logps[:, k], mask[:, k])
        right = _answers(hits[:, k], mask[:, k])
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
    logps, _, mask = _rows(seed)
    found = log_truth_ratio(logps, mask).exp()
    n_compared = 0
    for row in range(N):
        right, *wrong = _answers(logps[row], mask[row])
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


# -- the Kolmogorov-Smirnov test


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


# -- metrics, however rows are divided into batches and ranks


def _metrics() -> list:
    return [
        AnswerProbability(),
        ExactMemorisation(),
        ExtractionStrength(),
        TruthRatio("closer_to_one"),
        TruthRatio("truth_preferred"),
        ForgetQuality(),
        MembershipAUROC(0.3),
        RougeLRecall(),
    ]


def _feed(metrics: list, seed: int, part: slice) -> None:
    logps, hits, mask = (value[part] for value in _rows(seed))
    other = _rows(seed + 1)[0][part]
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 4, (N, 2, 6), generator=generator)[part].tolist()
    for metric in metrics:
        if isinstance(metric, AnswerProbability):
            metric.update(logps[:, 0], mask[:, 0])
        elif isinstance(metric, ExactMemorisation | ExtractionStrength):
            metric.update(hits[:, 0], mask[:, 0])
        elif isinstance(metric, TruthRatio):
            metric.update(logps, mask)
        elif isinstance(metric, ForgetQuality):
            metric.update(
                logps[:, 0].nanmean(-1).nan_to_num(-1.0), other[:, 1].nanmean(-1).nan_to_num(-2.0)
            )
        elif isinstance(metric, MembershipAUROC):
            metric.update(logps[:, 0], mask[:, 0], member=True)
            metric.update(logps[:, 1], mask[:, 1], member=False)
        else:
            metric.update([answer for answer, _ in tokens], [truth for _, truth in tokens])


@given(seed=SEEDS, cuts=CUTS)
def test_cutting_rows_into_batches_changes_nothing(seed, cuts):
    whole = _metrics()
    pieces = _metrics()
    _feed(whole, seed, slice(0, N))
    for part in _pieces(cuts):
        _feed(pieces, seed, part)
    for one, other in zip(whole, pieces, strict=True):
        assert one.compute() == other.compute()


@given(seed=SEEDS, cut=st.integers(0, N))
def test_two_ranks_together_are_one(seed, cut):
    whole = _metrics()
    first = _metrics()
    second = _metrics()
    _feed(whole, seed, slice(0, N))
    _feed(first, seed, slice(cut, N))  # the order of ranks does not matter either
    _feed(second, seed, slice(0, cut))
    for one, a, b in zip(whole, first, second, strict=True):
        a.merge_state(b)
        assert a.compute() == one.compute()
        assert all(reduction.__name__ == "dim_zero_cat" for reduction in a._reductions.values())


@given(seed=SEEDS, width=st.integers(1, 5))
def test_padding_changes_nothing(seed, width):
    logps, hits, mask = _rows(seed)
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


@pytest.mark.parametrize("seed", range(3))
def test_means_skip_rows_without_answer_and_have_an_interval(seed):
    logps, _, mask = _rows(seed)
    metric = AnswerProbability()
    metric.update(logps[:, 0].float(), mask[:, 0])
    values = [
        math.exp(sum(answer) / len(answer))
        for answer in _answers(logps[:, 0], mask[:, 0])
        if answer
    ]
    mean = sum(values) / len(values)
    low, high = wilson_interval(len(values) * mean, len(values))
    assert metric.compute() == pytest.approx(
        {"value": mean, "ci_low": low, "ci_high": high, "n": len(values)}, rel=1e-6
    )
    assert len(values) < N and low < mean < high


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_counted_is_nan_and_no_failure():
    for metric in _metrics():
        found = metric.compute()
        assert math.isnan(found["value"]) and found["n"] == 0


def test_a_diverged_model_shows_as_nan():
    metric = AnswerProbability()
    metric.update(torch.tensor([[-1.0], [math.nan]]), torch.ones(2, 1, dtype=torch.bool))
    assert math.isnan(metric.compute()["value"])


# -- membership


@given(seed=SEEDS, ties=st.booleans())
def test_auroc_is_the_share_of_pairs_with_a_likelier_member(seed, ties):
    generator = torch.Generator().manual_seed(seed)
    scores = -200 * torch.rand(
        2, 9, 4, generator=generator
    )  # a sigmoid would make most of these one number
    scores = (scores / 50).round() * 50 if ties else scores
    mask = torch.ones(9, 4, dtype=torch.bool)
    metric = MembershipAUROC(0.5)
    metric.update(scores[0], mask, member=True)
    metric.update(scores[1], mask, member=False)
    lowest = [[sum(sorted(row)[:2]) / 2 for row in rows] for rows in scores.tolist()]
    wins = sum((a > b) + 0.5 * (a == b) for a in lowest[0] for b in lowest[1])
    found = metric.compute()
    assert found["value"] == pytest.approx(wins / 81, abs=1e-6)
    assert (found["n"], found["n_holdout"]) == (9, 9)


def test_privacy_leakage_is_muses():
    # MUSE's AUC is of non-members: 1 - AUROC.
    for policy, retain in ((1.0, 0.5), (0.5, 0.5), (0.2, 0.48)):
        theirs = 1 - policy
        baseline = 1 - retain
        assert privacy_leakage(policy, retain) == pytest.approx(
            (theirs - baseline) / baseline * 100
        )
    assert math.isnan(privacy_leakage(0.5, 1.0))


@given(values=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5))
def test_utility_is_the_harmonic_mean(values):
    assert harmonic_mean(values) == pytest.approx(len(values) / sum(1 / v for v in values))
    assert min(values) - 1e-12 <= harmonic_mean(values) <= max(values) + 1e-12
    assert harmonic_mean([*values, 0.0]) == 0.0
    assert math.isnan(harmonic_mean([*values, math.nan])) and math.isnan(harmonic_mean([]))


# -- all metrics of one model


V = 6
END = 2


def _model(knows: bool, seed: int = 0) -> tuple[Scores, Tensor, Tensor]:
    """What a model that knows the first answer by heart, or nothing at all, says of N rows;
    labels_NKT and what it writes.

    An answer is four tokens of 3, 4 and 5, and the end token. The model that knows nothing is sure
    of token 0, ``<pad>``-like.
    """
    generator = torch.Generator().manual_seed(seed)
    answers = torch.randint(3, V, (N, K, 4), generator=generator)
    answers[:, 1:, 0] = (
        answers[:, :1, 0] - 3 + torch.tensor([[1, 2]])
    ) % 3 + 3  # wrong from the first token on
    labels = torch.cat([torch.full((N, K, 3), -100), answers, torch.full((N, K, 1), END)], dim=-1)
    believed = (
        labels[:, :1, 1:].expand(-1, K, -1) if knows else torch.zeros(N, K, 7, dtype=torch.long)
    )
    logits = torch.full((N, K, 7, V), -50.0).scatter(-1, believed.clamp(min=0).unsqueeze(-1), 50.0)
    targets = labels[:, :, 1:]
    logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    written = (
        torch.cat([answers[:, 0], torch.tensor([[END, 0]]).expand(N, -1)], dim=1)
        if knows
        else torch.full((N, 6), 0)
    )
    return Scores(logps.masked_fill(targets == -100, 0.0), targets != -100, logits), labels, written


def _measure(forget: bool, others: bool) -> UnlearningMetrics:
    measured = UnlearningMetrics(["forget", "holdout", "retain"], 0.2, END, {0, 1, END})
    for seed, (name, knows) in enumerate(
        {"forget": forget, "holdout": False, "retain": others}.items()
    ):
        scores, labels, written = _model(knows, seed)
        measured.update(name, scores, labels, written)
    return measured


def test_a_model_that_knows_everything_has_memorised_it_all():
    values = _measure(forget=True, others=True).compute()
    for name in (
        "answer_probability",
        "rouge_l_recall",
        "extraction_strength",
        "exact_memorisation",
    ):
        assert values[f"forget/{name}"]["value"] == values[f"retain/{name}"]["value"] == 1.0, name
        assert values[f"forget/{name}"]["n"] == N
    assert values["forget/truth_ratio"]["value"] < 1e-6
    assert values["membership_auroc"] == {"value": 1.0, "n": N, "n_holdout": N}
    assert values["model_utility"] == {
        "value": pytest.approx(1.0),
        "of": ["answer_probability", "rouge_l_recall", "truth_ratio"],
    }


def test_a_model_that_knows_nothing_has_no_utility():
    values = _measure(forget=False, others=False).compute()
    for name in (
        "answer_probability",
        "rouge_l_recall",
        "extraction_strength",
        "exact_memorisation",
    ):
        assert values[f"forget/{name}"]["value"] == pytest.approx(0.0, abs=1e-20), name
    assert values["forget/truth_ratio"]["value"] == pytest.approx(1.0)
    assert values["membership_auroc"]["value"] == 0.5
    assert values["model_utility"]["value"] == 0.0


def test_forget_quality_is_1_for_the_retain_model_itself():
    retain = _measure(forget=False, others=True)
    for forget, expected in ((False, 1.0), (True, ks_p_value(N * N, N, N))):
        policy = _measure(forget=forget, others=True)
        found = against_retain_model(policy, policy.compute(), retain, retain.compute())
        assert found["forget_quality"]["value"] == pytest.approx(expected)
        assert (found["forget_quality"]["n"], found["forget_quality"]["n_retain"]) == (N, N)
        assert found["privacy_leakage"]["value"] == pytest.approx(-100.0 if forget else 0.0)
    assert expected < 1e-6


def test_every_metric_is_in_the_table_of_names():
    metrics = _measure(forget=True, others=True)
    values = metrics.compute()
    values |= against_retain_model(metrics, values, metrics, values)
    keys = {name.rpartition("/")[2] for name in values}
    assert keys == {entry.key for entry in UNLEARNING_METRICS}


def test_the_end_token_counts_for_the_probability_alone():
    scores, labels, written = _model(knows=True)
    wrong_end = scores.logits[:, :, -1].flip(
        -1
    )  # the end is no longer expected, everything before it is
    scores.logits[:, :, -1] = wrong_end
    measured = UnlearningMetrics([], 0.2, END, {0, 1, END})
    measured.update("forget", scores, labels, written)
    values = measured.compute()
    assert (
        values["forget/extraction_strength"]["value"]
        == values["forget/exact_memorisation"]["value"]
        == 1.0
    )
    scores.logps[:, :, -1] = -5.0
    measured = UnlearningMetrics([], 0.2, END, {0, 1, END})
    measured.update("forget", scores, labels)
    assert measured.compute()["forget/answer_probability"]["value"] == pytest.approx(
        math.exp(-1.0), rel=1e-5
    )  # five tokens
    assert measured.membership.members[0].tolist() == pytest.approx([0.0] * N, abs=1e-6)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_metrics_whose_input_is_missing_are_left_out():
    scores, labels, _ = _model(knows=True)
    measured = UnlearningMetrics([], 0.2, END, set())
    measured.update("retain", Scores(scores.logps, scores.mask), labels)
    values = measured.compute()
    assert set(values) == {"retain/answer_probability", "membership_auroc", "model_utility"}
    assert values["model_utility"]["of"] == ["answer_probability"]


def test_a_set_has_wrong_answers_if_any_row_has_one():
    rows = {
        name: {"labels": torch.full((2, 2, 3), -100)} for name in ("forget", "holdout", "retain")
    }
    rows["retain"]["labels"][1, 1, 2] = 5
    rows["forget"]["labels"][0, 0, 2] = 5
    assert sets_with_wrong_answers(rows) == ["retain"]
