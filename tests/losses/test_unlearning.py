"""Unlearning losses against loops: values, detached weights, padding, and gradients."""

import math
from typing import get_args

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch._subclasses import FakeTensorMode

from temper.losses import Scores, SequenceScores, token_logps
from temper.losses.unlearning import FORGET, RETAIN, ForgetName, RetainName

V = 7
D = 3
T = 6
TERMS = {f"forget {name}": term for name, term in FORGET.items()} | {
    f"retain {name}": term for name, term in RETAIN.items() if term
}


def scores(
    seed: int, pairs: bool, labels: torch.Tensor, widened: int = 0
) -> tuple[Scores, torch.Tensor]:
    """Scores of random logits and hidden states (float64), and the logits.

    ``widened`` columns of padding on the right hold noise.
    """
    rng = torch.Generator().manual_seed(seed)
    shape = labels.shape
    logits = torch.randn(*shape, V, generator=rng, dtype=torch.float64)
    hidden = [torch.randn(*shape, D, generator=rng, dtype=torch.float64) for _ in range(3)]
    attended = torch.ones(shape, dtype=torch.bool)
    if widened:
        noise = lambda size: (
            torch.randn(*shape[:-1], widened, size, generator=rng, dtype=torch.float64) * 9
        )  # noqa: E731
        logits = torch.cat([logits, noise(V)], -2)
        hidden = [torch.cat([h, noise(D)], -2) for h in hidden]
        labels = torch.nn.functional.pad(labels, (0, widened), value=-100)
        attended = torch.nn.functional.pad(attended, (0, widened))
    logits.requires_grad_()
    logps, mask = token_logps(logits, labels)
    aligned = logits[..., :-1, :]
    return Scores(logps, mask, aligned, tuple(hidden), attended, labels[..., 1:]), logits


def some_labels(seed: int, pairs: bool, rows: int = 3) -> torch.Tensor:
    """A prompt of 2 tokens, then answers of 1 to 4 tokens."""
    rng = torch.Generator().manual_seed(seed + 1000)
    shape = (rows, 2, T) if pairs else (rows, T)
    labels = torch.randint(V, shape, generator=rng)
    lengths = torch.randint(1, T - 1, shape[:-1], generator=rng)
    place = torch.arange(T)
    return labels.masked_fill((place < 2) | (place >= 2 + lengths[..., None]), -100)


def given_scores(term, seed=0, widened=0):
    labels = some_labels(seed, term.sequences == "both")
    policy, logits = scores(seed, term.sequences == "both", labels, widened)
    reference = scores(seed + 1, term.sequences == "both", labels, widened)[0].detach()
    return policy, reference, logits


def test_the_accepted_names_are_those_of_the_tables():
    assert get_args(ForgetName) == tuple(FORGET)
    assert get_args(RetainName) == tuple(RETAIN)


def by_loops(name: str, policy: Scores, reference: Scores) -> tuple[float, float]:
    """Mean of a forget loss as a Python float, and its denominator."""
    p = policy.logps.tolist()
    r = reference.logps.tolist()
    mask = policy.mask.tolist()
    log_sigma = lambda x: -math.log1p(math.exp(-x))  # noqa: E731
    tokens = lambda i: [t for t in range(T - 1) if mask[i][t]]  # noqa: E731
    total = count = 0.0
    if name == "bounded":
        for i in range(len(p)):
            answer, substitute = (
                [p[i][k][t] for t in range(T - 1) if mask[i][k][t]] for k in (0, 1)
            )
            total += -sum(substitute) / len(substitute) + 0.1 * sum(answer) / len(answer)
            count += 1
    elif name == "idk_dpo":
        for i in range(len(p)):
            gain = [
                sum(p[i][k][t] - r[i][k][t] for t in range(T - 1) if mask[i][k][t]) for k in (0, 1)
            ]
            total += -2 / 0.1 * log_sigma(0.1 * (gain[1] - gain[0]))
            count += 1
    elif name in ("npo", "simnpo"):
        for i in range(len(p)):
            ratio = sum(p[i][t] - r[i][t] for t in tokens(i))
            mean_nll = -sum(p[i][t] for t in tokens(i)) / len(tokens(i))
            total += {
                "npo": -2 / 0.1 * log_sigma(-0.1 * ratio),
                "simnpo": -2 / 4.5 * log_sigma(4.5 * mean_nll),
            }[name]
            count += 1
    else:
        for i in range(len(p)):
            for t in tokens(i):
                q = math.exp(p[i][t])
                total += {
                    "ga": p[i][t],
                    "idk_nll": -p[i][t],
                    "wga": q * p[i][t],
                    "satimp": q**5 * (1 - q) * p[i][t],
                    "undial": 0,
                }[name]
                count += 1
                if name == "undial":
                    z = policy.logits[i, t].tolist()
                    ref = reference.logits[i, t].tolist()
                    ref[int(policy.labels[i, t])] -= 10
                    weight = [math.exp(x) / sum(map(math.exp, ref)) for x in ref]
                    total -= sum(
                        w * (x - math.log(sum(map(math.exp, z))))
                        for w, x in zip(weight, z, strict=True)
                    )
    return total / count, count


@pytest.mark.parametrize("name", FORGET)
def test_every_forget_loss_is_its_equation(name: str):
    policy, reference, _ = given_scores(FORGET[name], seed=5)
    terms = FORGET[name].loss(policy, reference, FORGET[name].options)
    mean, count = by_loops(name, policy.detach(), reference)
    assert float(terms.count) == count
    assert float(terms.total.detach() / terms.count) == pytest.approx(mean, rel=1e-10)


def test_the_margin_of_simnpo_is_in_nats_per_token():
    policy, _, _ = given_scores(FORGET["simnpo"])
    at_margin = FORGET["simnpo"].loss(
        policy[:1], None, {"beta": 2.0, "delta": float(-policy[:1].means.detach())}
    )
    assert float(at_margin.total.detach()) == pytest.approx(2 / 2.0 * math.log(2))


@pytest.mark.parametrize(
    "name", [name for name, term in FORGET.items() if term.reference == "sums"]
)
def test_losses_of_sums_alone_work_with_cached_scores(name: str):
    policy, reference, _ = given_scores(FORGET[name])
    whole, cached = (
        FORGET[name].loss(policy, r, FORGET[name].options).total
        for r in (reference, SequenceScores(reference.sums))
    )
    assert torch.equal(whole, cached)


@pytest.mark.parametrize(
    ("name", "weight"), [("wga", lambda p: p), ("satimp", lambda p: p**5 * (1 - p))]
)
def test_weights_of_the_ascent_are_constants_in_its_gradient(name: str, weight):
    policy, _, _ = given_scores(FORGET[name])
    logps = policy.logps.detach().requires_grad_()
    FORGET[name].loss(Scores(logps, policy.mask), None, FORGET[name].options).total.backward()
    assert torch.allclose(
        logps.grad, weight(logps.detach().exp()) * policy.mask, rtol=1e-12, atol=0
    )


def test_undial_has_a_gradient_on_answer_tokens_only():
    policy, reference, logits = given_scores(FORGET["undial"], widened=2)
    FORGET["undial"].loss(policy, reference, FORGET["undial"].options).total.backward()
    touched = logits.grad.abs().sum(-1)[:, :-1] > 0
    assert torch.equal(touched, policy.mask)


def test_undial_does_not_use_the_ignore_index_as_a_label():
    """As an index, -100 would lower the logit of token V - 100 at every prompt position."""
    policy, reference, _ = given_scores(FORGET["undial"])
    other = Scores(
        policy.logps, policy.mask, policy.logits, labels=policy.labels.masked_fill(~policy.mask, 3)
    )
    assert torch.equal(
        *(FORGET["undial"].loss(p, reference, {"beta": 10.0}).total for p in (policy, other))
    )


@pytest.mark.parametrize("name", TERMS)
@given(seed=st.integers(0, 10**6), widened=st.integers(1, 4))
def test_padding_changes_nothing(name: str, seed: int, widened: int):
    plain, padded = (
        TERMS[name].loss(*given_scores(TERMS[name], seed, w)[:2], TERMS[name].options)
        for w in (0, widened)
    )
    assert float(plain.count) == float(padded.count)
    assert float(padded.total.detach()) == pytest.approx(float(plain.total.detach()), rel=1e-12)


@pytest.mark.parametrize("name", TERMS)
def test_low_precision_goes_through_at_least_float32(name: str):
    policy, reference, _ = given_scores(TERMS[name])
    low = lambda s: Scores(  # noqa: E731
        s.logps.float(),
        s.mask,
        s.logits.bfloat16(),
        tuple(h.bfloat16() for h in s.hidden),
        s.attended,
        s.labels,
    )
    assert (
        TERMS[name].loss(low(policy), low(reference), TERMS[name].options).total.dtype
        == torch.float32
    )


@pytest.mark.parametrize("name", TERMS)
def test_no_loss_synchronizes_with_the_device(name: str):
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy, reference = (s._map(torch.Tensor.clone) for s in given_scores(TERMS[name])[:2])
        TERMS[name].loss(policy, reference, TERMS[name].options)
