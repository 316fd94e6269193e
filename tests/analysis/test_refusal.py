"""The refusal direction's scores against plain formulas, and the choice among candidates."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from temper.analysis.refusal import (
    Candidate,
    kl_divergence,
    mean_difference,
    refusal_score,
    select_candidate,
)

LOGITS = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def candidate(**changes: float) -> Candidate:
    settings = {"layer": 1, "position": -1, "ablated": 0.0, "induced": 1.0, "kl": 0.01}
    return Candidate(**settings | changes)  # type: ignore[arg-type]


def test_the_score_is_the_log_odds_of_the_refusal_tokens():
    p = LOGITS.softmax(-1)[:, [2, 5]].sum(-1)
    torch.testing.assert_close(
        refusal_score(LOGITS, [2, 5]), torch.log(p / (1 - p)), rtol=1e-12, atol=0
    )


def test_the_score_is_finite_where_probabilities_round_to_one():
    logits = torch.tensor([[200.0, 0.0, 0.0]])
    assert refusal_score(logits, [0]).item() == pytest.approx(200 - math.log(2))
    assert refusal_score(logits, [1]).item() == pytest.approx(-200)


def test_the_divergence_is_that_of_torch():
    other = LOGITS.flip(0)
    expected = torch.nn.functional.kl_div(
        other.log_softmax(-1), LOGITS.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(kl_divergence(LOGITS, other), expected, rtol=1e-12, atol=0)
    assert (kl_divergence(LOGITS, LOGITS) == 0).all()


def test_candidates_are_differences_of_means():
    unsafe = torch.randn(4, 2, 3, 5)
    safe = torch.randn(6, 2, 3, 5)
    found = mean_difference(unsafe, safe)
    assert found.shape == (2, 3, 5) and found.dtype == torch.float64
    torch.testing.assert_close(found.float(), unsafe.mean(0) - safe.mean(0))


def test_the_lowest_score_that_passes_is_chosen():
    good = candidate(ablated=-2.0)
    candidates = [
        candidate(ablated=-1.0),
        good,
        candidate(ablated=-9.0, kl=0.2),
        candidate(ablated=-9.0, induced=-0.1),
        candidate(ablated=-9.0, layer=8),
        candidate(ablated=math.nan),
    ]
    found = select_candidate(candidates, n_layers=10)
    assert found.best == good
    assert found.left_out == {
        "not finite": 1,
        "last layers": 1,
        "changes safe answers": 1,
        "induces nothing": 1,
    }


def test_without_a_candidate_the_reasons_are_left():
    found = select_candidate([candidate(kl=math.inf), candidate(kl=1.0)], n_layers=10)
    assert found.best is None
    assert found.left_out == {"not finite": 1, "changes safe answers": 1}


def test_a_bolder_attacker_accepts_more_change():
    assert select_candidate([candidate(kl=0.2)], n_layers=10, max_kl=0.3).best is not None


@given(st.lists(st.tuples(*[st.floats(allow_nan=True) for _ in range(3)]), max_size=8))
def test_what_is_chosen_passes_every_limit(scores):
    candidates = [candidate(ablated=a, induced=i, kl=k) for a, i, k in scores]
    found = select_candidate(candidates, n_layers=10)
    assert sum(found.left_out.values()) <= len(candidates)
    if found.best is None:
        assert sum(found.left_out.values()) == len(candidates)
    else:
        assert math.isfinite(found.best.ablated)
        assert found.best.kl <= 0.1 and found.best.induced >= 0
