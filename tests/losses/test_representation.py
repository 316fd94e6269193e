"""Losses on hidden states against loops; masked positions; gradients."""

import pytest
import torch

from temper.losses import Scores
from temper.losses.representation import Average, hidden_distance, steering

B = 3
T = 5
D = 4
LAYERS = 2


def scores(seed: int, grad: bool = True) -> Scores:
    rng = torch.Generator().manual_seed(seed)
    hidden = tuple(
        torch.randn(B, T, D, generator=rng, dtype=torch.float64).requires_grad_(grad)
        for _ in range(LAYERS + 1)
    )
    attended = torch.arange(T) < torch.tensor([[5], [3], [1]])
    return Scores(torch.zeros(B, T - 1), attended[:, 1:], hidden=hidden, attended=attended)


def plain(policy: Scores, goal, layer: int) -> tuple[float, int]:
    total = 0.0
    count = 0
    for row in range(B):
        for position in range(T):
            if policy.attended[row, position]:
                total += sum(
                    float(h - g) ** 2
                    for h, g in zip(
                        policy.hidden[layer][row, position].detach(),
                        goal(row, position),
                        strict=True,
                    )
                )
                count += 1
    return total, count


@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_distances_are_mean_squared_norms_over_attended_tokens(layer: int):
    policy = scores(0)
    reference = scores(1, grad=False)
    target = torch.arange(float(D)).double()
    for terms, goal in (
        (
            hidden_distance(policy, reference, layer),
            lambda row, position: reference.hidden[layer][row, position],
        ),
        (steering(policy, target, layer), lambda row, position: target),
    ):
        total, count = plain(policy, goal, layer)
        assert int(terms.count) == count == 9
        assert float(terms.total.detach()) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_means_over_answers_and_by_row_are_plain_loops(answers: bool, by_row: bool):
    policy = scores(0)
    # Labelled tokens 3 and 4 of row 0, token 2 of row 1, none of row 2.
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    policy = Scores(policy.logps, mask, hidden=policy.hidden, attended=policy.attended)
    target = torch.arange(float(D)).double()
    places = [[3, 4], [2], []] if answers else [range(5), range(3), range(1)]
    rows = [
        [float(((policy.hidden[1][i, t].detach() - target) ** 2).sum()) for t in kept]
        for i, kept in enumerate(places)
    ]
    means = [sum(row) / len(row) for row in rows if row] if by_row else sum(rows, [])
    terms = steering(policy, target, 1, Average(answers, by_row))
    assert int(terms.count) == len(means)
    assert float(terms.total.detach()) == pytest.approx(sum(means), rel=1e-12)
    other = hidden_distance(policy, scores(1), 1, Average(answers, by_row))
    assert int(other.count) == len(means)


def test_without_a_layer_it_is_the_mean_over_decoder_layers():
    policy = scores(0)
    reference = scores(1, grad=False)
    each = [hidden_distance(policy, reference, layer).total for layer in (1, 2)]
    every = hidden_distance(policy, reference)
    assert float(every.total) == pytest.approx(float(sum(each) / 2), rel=1e-12)
    every.total.backward()
    assert policy.hidden[0].grad is None


def test_at_the_reference_value_and_gradient_are_zero():
    policy = scores(0)
    total = hidden_distance(policy, policy.detach()).total
    total.backward()
    assert float(total) == 0
    assert all(not h.grad.any() for h in policy.hidden[1:])


def test_only_attended_positions_of_the_layer_have_a_gradient():
    policy = scores(0)
    reference = scores(1)
    (
        hidden_distance(policy, reference, 1).total + steering(policy, torch.ones(D), 1).total
    ).backward()
    assert torch.equal(policy.hidden[1].grad.abs().sum(-1) > 0, policy.attended)
    assert policy.hidden[2].grad is None
    assert reference.hidden[1].grad is None


def test_states_of_low_precision_are_compared_in_float32():
    low = scores(0, grad=False)._map(lambda t: t.bfloat16() if t.is_floating_point() else t)
    assert (
        hidden_distance(low, low).total.dtype
        == steering(low, torch.ones(D), 1).total.dtype
        == torch.float32
    )
