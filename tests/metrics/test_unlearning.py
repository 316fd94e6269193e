"""Unlearning metrics of whole sets: models that know everything or nothing, batches and ranks."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from temper.losses import Scores
from temper.metrics import wilson_interval
from temper.metrics.kolmogorov import ks_p_value
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
from tests.metrics.answers import SEEDS, K, N, random_answers, unmasked

CUTS = st.lists(st.integers(0, N), max_size=4).map(sorted)


def _pieces(cuts: list[int]) -> Iterator[slice]:
    ends = [0, *cuts, N]
    return (slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True))


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
    logps, hits, mask = (value[part] for value in random_answers(seed))
    other = random_answers(seed + 1)[0][part]
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


@pytest.mark.parametrize("seed", range(3))
def test_means_skip_rows_without_answer_and_have_an_interval(seed):
    logps, _, mask = random_answers(seed)
    metric = AnswerProbability()
    metric.update(logps[:, 0].float(), mask[:, 0])
    values = [
        math.exp(sum(answer) / len(answer))
        for answer in unmasked(logps[:, 0], mask[:, 0])
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
    rows["retain"]["paraphrased"] = torch.tensor([False, True])
    assert sets_with_wrong_answers(rows) == []
