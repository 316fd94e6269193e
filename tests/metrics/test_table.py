"""The one table of metric names: complete, unambiguous, and in step with the metrics."""

import pytest

from temper.judges import Judgement
from temper.metrics import SafetyMetrics
from temper.metrics.safety import METRICS
from temper.metrics.table import (
    BY_COLUMN,
    SAFETY_METRICS,
    TITLES,
    UNLEARNING_METRICS,
    jailbreak_name,
    title,
)

KINDS = ("unsafe", "safe", "task", "jb_co_task")


def test_the_table_lists_exactly_the_safety_metrics():
    keys = [entry.key for entry in SAFETY_METRICS]
    assert sorted(METRICS) == sorted(keys)
    assert list(SafetyMetrics(KINDS).metrics) == [*keys, "asr/jb_co_task"]
    assert all(title(key) for key in SafetyMetrics(KINDS).metrics)


@pytest.mark.parametrize("entry", SAFETY_METRICS, ids=lambda entry: entry.key)
def test_the_kind_in_the_table_is_the_kind_that_a_metric_counts(entry):
    metric = METRICS[entry.key]()
    judged = Judgement("harmful", 1.0, refused=True, correct=True, degenerate=True)
    metric.update(KINDS, [judged] * len(KINDS))
    assert metric.kind == entry.kind
    assert metric.compute()["n"] == (len(KINDS) if entry.kind is None else 1)


@pytest.mark.parametrize("kind", ["unsafe", "safe", "task"])
def test_metrics_of_missing_kinds_are_left_out(kind):
    expected = [entry.key for entry in SAFETY_METRICS if entry.kind in (None, kind)]
    assert list(SafetyMetrics([kind]).metrics) == expected


def test_names_are_unambiguous_and_columns_are_numbered():
    for field in ("key", "title", "meaning", "column", "short", "latex"):
        names = [getattr(entry, field) for entry in SAFETY_METRICS]
        assert len(set(names)) == len(names) and all(names), field
    assert [entry.order for entry in BY_COLUMN] == list(range(1, len(SAFETY_METRICS) + 1))
    assert len(TITLES) == len(SAFETY_METRICS) + len(UNLEARNING_METRICS)


def test_a_jailbreak_is_named_after_its_kind():
    assert title("asr/jb_co_task") == "ASR, jb_co_task"
    assert jailbreak_name("asr/jb_co_task") == "co task"
