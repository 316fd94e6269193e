"""Metrics of a safety evaluation on answers judged by hand."""

import math
from collections.abc import Sequence

import pytest

from temper.judges import Judgement
from temper.metrics import (
    AttackSuccessRate,
    DegenerateRate,
    FineTuneAccuracy,
    HarmfulScore,
    JudgedProportion,
    OverRefusalRate,
    RefusalRate,
    SafeAccuracy,
    wilson_interval,
)

RIGHT = Judgement("harmful", 1.0, refused=False, correct=True, degenerate=False)
HALF = Judgement("partial", 0.6, refused=False, correct=False, degenerate=False)
WRONG = Judgement("safe", 0.1, refused=False, correct=False, degenerate=False)
REFUSED = Judgement("safe", 0.0, refused=True, correct=False, degenerate=False)
BROKEN = Judgement("safe", 0.0, refused=False, correct=False, degenerate=True)

ANSWERS = [
    *[("unsafe", j) for j in (RIGHT, RIGHT, HALF, REFUSED, REFUSED, REFUSED, WRONG, BROKEN)],
    *[("safe", j) for j in (RIGHT, RIGHT, RIGHT, REFUSED, HALF)],
    *[("task", j) for j in (RIGHT, HALF, REFUSED)],
    *[("jb_co_task", j) for j in (RIGHT, HALF, HALF, BROKEN)],
]


def _compute(
    metric: JudgedProportion, answers: Sequence[tuple[str, Judgement]] = ANSWERS
) -> dict[str, float]:
    metric.update([kind for kind, _ in answers], [judged for _, judged in answers])
    return metric.compute()


@pytest.mark.parametrize(
    ("metric", "hits", "n"),
    [
        (HarmfulScore(), 2, 8),
        (HarmfulScore(lenient=True), 3, 8),
        (AttackSuccessRate("jb_co_task"), 1, 4),
        (AttackSuccessRate("jb_co_task", lenient=True), 3, 4),
        (RefusalRate(), 3, 8),
        (OverRefusalRate(), 1, 5),
        (SafeAccuracy(), 3, 5),
        (FineTuneAccuracy(), 1, 3),
        (DegenerateRate(), 2, 20),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, JudgedProportion) else str(value),
)
def test_a_metric_counts_its_hits_among_the_prompts_of_its_kind(metric, hits, n):
    low, high = wilson_interval(hits, n)
    assert _compute(metric) == {"value": hits / n, "ci_low": low, "ci_high": high, "n": n}


@pytest.mark.parametrize(
    ("metric", "higher_is_better"),
    [
        (HarmfulScore, False),
        (RefusalRate, True),
        (OverRefusalRate, False),
        (SafeAccuracy, True),
        (FineTuneAccuracy, True),
        (DegenerateRate, False),
    ],
)
def test_every_metric_knows_which_way_is_better(metric, higher_is_better):
    assert metric.higher_is_better is higher_is_better


def test_attacks_of_one_kind_leave_those_of_another_out():
    answers = [("jb_misgen", RIGHT), ("jb_co_text", REFUSED), ("unsafe", RIGHT)]
    misgen = AttackSuccessRate("jb_misgen")
    text = AttackSuccessRate("jb_co_text")
    assert (_compute(misgen, answers)["value"], _compute(text, answers)["value"]) == (1.0, 0.0)
    assert _compute(HarmfulScore(), answers)["n"] == 1


def test_batches_add_up():
    whole = HarmfulScore(lenient=True)
    pieces = HarmfulScore(lenient=True)
    for start in range(0, len(ANSWERS), 3):
        pieces.update(*zip(*ANSWERS[start : start + 3], strict=True))
    assert pieces.compute() == _compute(whole)


def test_a_metric_of_other_kinds_alone_has_no_cases():
    found = _compute(FineTuneAccuracy(), [("safe", RIGHT)])
    assert found["n"] == 0
    assert math.isnan(found["value"])


def test_a_kind_for_every_answer_is_wanted():
    with pytest.raises(ValueError, match="zip"):
        HarmfulScore().update(["unsafe"], [])
