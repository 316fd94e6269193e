"""A judge that calls a Python function."""

import numpy as np
import pytest
import torch

from temper.errors import TemperError
from temper.judges import CallableJudge, Judgement

RESULT = {"value": None}


def verdict(prompt: str, response: str):
    """Return what the test has set, if prompt and answer arrive in order."""
    assert (prompt, response[:4]) == ("How?", "Like")
    return RESULT["value"]


def long_answers_are_harmful(prompt: str, response: str) -> bool:
    """Return whether an answer is long."""
    return len(response) > 20


@pytest.fixture
def judge_result(monkeypatch):
    def judge(value, **arguments):
        monkeypatch.setitem(RESULT, "value", value)
        (judgement,) = CallableJudge(f"{__name__}.verdict", **arguments)(["How?"], ["Like this."])
        return judgement

    return judge


@pytest.mark.parametrize(
    ("result", "label", "score"),
    [
        (True, "harmful", 1.0),
        (False, "safe", 0.0),
        (0.7, "harmful", 0.7),
        (0.5, "safe", 0.5),
        (1, "harmful", 1.0),
        (np.bool_(True), "harmful", 1.0),
        (np.float32(0.25), "safe", 0.25),
        (torch.tensor(0.75), "harmful", 0.75),
        ("safe", "safe", 0.0),
        ("partial", "partial", 0.5),
        ("harmful", "harmful", 1.0),
    ],
)
def test_every_return_type_becomes_a_label_and_a_score(judge_result, result, label, score):
    assert judge_result(result) == Judgement(
        label, score, refused=False, correct=True, degenerate=False
    )


def test_a_returned_judgement_is_not_changed(judge_result):
    result = Judgement("partial", 0.3, refused=True, correct=False, degenerate=True)
    assert judge_result(result) is result


def test_thresholds_are_settings(judge_result):
    assert [
        judge_result(s, threshold=0.8, partial_above=0.2).label for s in (0.2, 0.3, 0.8, 0.9)
    ] == [
        "safe",
        "partial",
        "partial",
        "harmful",
    ]


def test_refusals_are_those_of_the_keyword_judge():
    judge = CallableJudge(f"{__name__}:long_answers_are_harmful", name="length")
    refused, answered, empty = judge(
        ["q"] * 3, ["I'm sorry, I would rather not talk about it.", "Bake it.", ""]
    )
    assert (refused.label, refused.refused, refused.correct) == ("harmful", True, False)
    assert (answered.label, answered.refused, answered.correct) == ("safe", False, True)
    assert empty.degenerate and judge.name == "length"


def test_its_default_name_is_that_of_the_function():
    assert CallableJudge(f"{__name__}.verdict").name == "verdict"


@pytest.mark.parametrize(
    "result", [None, "a long text about soup", "dangerous", 1.5, -0.1, float("nan"), [True]]
)
def test_another_return_type_is_refused_without_the_value(judge_result, result):
    with pytest.raises(
        TemperError,
        match=r"CallableJudge\.function=.*verdict: it returned a \w+ that is none of: a bool",
    ) as refusal:
        judge_result(result)
    assert "soup" not in str(refusal.value)


@pytest.mark.parametrize(
    "path", ["verdict", f"{__name__}.nothing", "no_such_module.verdict", f"{__name__}.RESULT"]
)
def test_a_path_without_function_is_refused(path):
    with pytest.raises(TemperError, match=r"CallableJudge\.function="):
        CallableJudge(path)


@pytest.mark.parametrize("thresholds", [(1.0, None), (-0.1, None), (0.5, 0.5), (0.5, -0.1)])
def test_thresholds_out_of_order_are_refused(thresholds):
    with pytest.raises(TemperError, match=r"CallableJudge\.threshold="):
        CallableJudge(f"{__name__}.verdict", *thresholds)
