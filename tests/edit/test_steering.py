"""Steering and weight masks against plain float64 loops."""

import math

import numpy as np
import pytest
import torch

from temper.edit import fuse, relaxed_bernoulli, steer, steering_vectors, wanda_top


def plain_steer(x: list[float], v: list[float], alpha: float) -> list[float]:
    norm = lambda a: math.sqrt(sum(e * e for e in a))  # noqa: E731
    cosine = sum(a * b for a, b in zip(x, v, strict=True)) / (norm(x) * norm(v))
    step = 0.1 * alpha * (1 + max(0.0, cosine))
    turned = [a / norm(x) - step * b / norm(v) for a, b in zip(x, v, strict=True)]
    return [norm(x) * e / norm(turned) for e in turned]


def test_steering_follows_its_equation():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    v = torch.randn(6, dtype=torch.float64)
    found = steer(x, v, 2.5)
    expected = torch.tensor(
        [[plain_steer(t.tolist(), v.tolist(), 2.5) for t in row] for row in x], dtype=torch.float64
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)


def test_steering_turns_away_from_the_unsafe_direction():
    torch.manual_seed(0)
    x = torch.randn(50, 6, dtype=torch.float64)
    v = torch.randn(6, dtype=torch.float64)
    cosine = lambda y: torch.cosine_similarity(y, v, dim=-1)  # noqa: E731
    assert (cosine(steer(x, v, 1.0)) < cosine(x)).all()


def test_alpha_zero_is_identity_and_zero_vectors_stay_finite():
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    assert steer(x, torch.randn(4), 0.0) is x
    assert steer(x, torch.randn(4), 1.0).dtype == torch.bfloat16
    assert torch.equal(steer(torch.zeros(2, 4), torch.randn(4), 1.0), torch.zeros(2, 4))


@pytest.mark.parametrize("seed", range(6))
def test_the_vector_is_first_component_plus_mean_towards_unsafe(seed):
    torch.manual_seed(seed)
    differences = torch.randn(7, 2, 3, dtype=torch.float64) + 0.3
    flat = differences.flatten(1).numpy()
    values, vectors = np.linalg.eigh(np.cov(flat.T))
    component = vectors[:, values.argmax()]
    mean = flat.mean(0)
    component *= np.sign(component @ mean)
    expected = torch.from_numpy((component + mean).reshape(2, 3))
    torch.testing.assert_close(steering_vectors(differences), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(steering_vectors(-differences), -expected, rtol=1e-9, atol=1e-12)


def test_wanda_takes_the_top_of_every_row():
    torch.manual_seed(2)
    weight = torch.randn(5, 7, dtype=torch.float64)
    squares = torch.rand(7, dtype=torch.float64)
    for ratio, n in ((0.0, 0), (0.1, 1), (0.3, 3), (0.99, 7)):
        found = wanda_top(weight, squares, ratio)
        for i, row in enumerate(weight.tolist()):
            scores = [abs(w) * math.sqrt(s) for w, s in zip(row, squares.tolist(), strict=True)]
            top = sorted(range(7), key=lambda j: scores[j])[7 - n :]
            assert found[i].nonzero()[:, 0].tolist() == sorted(top)


def test_relaxed_bernoulli_and_fuse_follow_their_equations():
    logits = torch.tensor([0.3, -1.0], dtype=torch.float64)
    uniform = torch.tensor([0.2, 0.9], dtype=torch.float64)
    mask = relaxed_bernoulli(logits, uniform, 0.5)
    expected = [
        1 / (1 + math.exp(-(z + math.log(u / (1 - u))) / 0.5))
        for z, u in zip(logits.tolist(), uniform.tolist(), strict=True)
    ]
    torch.testing.assert_close(
        mask, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )
    assert relaxed_bernoulli(torch.zeros(1), torch.zeros(1), 0.5).isfinite().all()
    safe = torch.tensor([1.0, 2.0], dtype=torch.float64)
    tau = torch.tensor([0.5, -0.5], dtype=torch.float64)
    mean = sum(expected) / 2
    plain = [1.0 + 0.3 * expected[0] * 0.5 / mean, 2.0 + 0.3 * expected[1] * -0.5 / mean]
    torch.testing.assert_close(
        fuse(safe, tau, mask, 0.3), torch.tensor(plain, dtype=torch.float64), rtol=1e-12, atol=0
    )
