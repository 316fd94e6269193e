"""Agreement of judges, by hand and against torchmetrics."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_cohen_kappa

from temper.metrics import agreements, cohens_kappa

LABELS = ("safe", "partial", "harmful")
# Of 10 answers, both say harmful to 4 and safe to 3; the first alone says harmful to 2, the second
# alone to 1: they agree on 0.7, and 0.6 * 0.5 + 0.4 * 0.5 = 0.5 would be chance.
FIRST = ["harmful"] * 6 + ["safe"] * 4
SECOND = ["harmful"] * 4 + ["safe"] * 2 + ["harmful"] + ["safe"] * 3


def test_kappa_of_a_table_counted_by_hand():
    assert cohens_kappa(FIRST, SECOND) == pytest.approx((0.7 - 0.5) / (1 - 0.5))


@given(
    st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=40)
)
def test_kappa_is_that_of_torchmetrics_where_it_is_defined(pairs):
    first, second = ([pair[i] for pair in pairs] for i in (0, 1))
    found = cohens_kappa(first, second)
    if found is None:
        assert set(first) == set(second) and len(set(first)) == 1
        return
    numbers = (
        torch.tensor([LABELS.index(label) for label in labels]) for labels in (first, second)
    )
    assert found == pytest.approx(float(multiclass_cohen_kappa(*numbers, num_classes=3)), abs=1e-6)
    assert found == cohens_kappa(second, first) <= 1


@pytest.mark.parametrize(
    ("first", "second", "kappa"),
    [
        (["safe", "harmful"], ["safe", "harmful"], 1.0),
        (["safe", "harmful"], ["harmful", "safe"], -1.0),
        (
            ["safe", "safe"],
            ["harmful", "harmful"],
            0.0,
        ),  # constants, but not the same: no better than chance
        (["safe", "safe"], ["safe", "harmful"], 0.0),
        (["safe", "safe"], ["safe", "safe"], None),
        ([], [], None),
    ],
)
def test_the_ends_of_the_scale(first, second, kappa):
    assert cohens_kappa(first, second) == kappa


def test_every_two_judges_are_compared():
    found = agreements({"a": FIRST, "b": SECOND, "c": FIRST})
    assert [pair["judges"] for pair in found] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert [pair["agreement"] for pair in found] == [0.7, 1.0, 0.7] and {
        pair["n"] for pair in found
    } == {10}
    assert [pair["kappa"] for pair in found] == pytest.approx([0.4, 1.0, 0.4])


def test_no_answers_or_one_judge_give_no_agreement():
    assert agreements({"a": [], "b": []}) == [
        {"judges": ["a", "b"], "kappa": None, "agreement": None, "n": 0}
    ]
    assert agreements({"a": FIRST}) == []


def test_labels_of_different_answers_cannot_be_compared():
    with pytest.raises(ValueError):
        cohens_kappa(["safe"], ["safe", "safe"])
