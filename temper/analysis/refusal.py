"""The refusal direction (Arditi et al. 2024, arXiv 2406.11717): candidates, scores, selection.

Shapes: `B` prompts, `L` layers, `P` positions, `D` width, `V` vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAVE_OUT_LAYERS = 0.2  # of the layers, the last ones
MAX_KL = 0.1  # nats
MIN_INDUCED = 0.0  # log odds


def mean_difference(unsafe_BLPD: Tensor, safe_BLPD: Tensor) -> Tensor:
    """Candidates: mean residual activation of unsafe prompts minus that of safe ones.

    Computed in float64.

    Returns:
        ``L x P x D``.
    """
    return unsafe_BLPD.double().mean(0) - safe_BLPD.double().mean(0)


def refusal_score(logits_BV: Tensor, refusal_ids: Sequence[int]) -> Tensor:
    """Log odds that the next token begins a refusal, in nats, float64 (section 2.3).

    ``log p - log(1 - p)`` with ``p = sum over refusal tokens``, computed from the logits, so that
    it stays finite where p rounds to 0 or 1. (The official code adds 1e-8 to both.)

    Args:
        logits_BV: Logits of an answer's first token.
        refusal_ids: Tokens that begin a refusal; at least one, and not all of the vocabulary.

    Returns:
        ``B``.
    """
    begins_V = torch.zeros(logits_BV.shape[-1], dtype=torch.bool, device=logits_BV.device)
    begins_V[list(refusal_ids)] = True
    logits = logits_BV.double()
    refusal = logits.masked_fill(~begins_V, -torch.inf).logsumexp(-1)
    return refusal - logits.masked_fill(begins_V, -torch.inf).logsumexp(-1)


def kl_divergence(plain_BV: Tensor, changed_BV: Tensor) -> Tensor:
    """``KL(plain || changed)`` of the next token, in nats, float64.

    Args:
        plain_BV: Logits of the network as it is.
        changed_BV: Logits of the changed network.

    Returns:
        ``B``.
    """
    plain = plain_BV.double().log_softmax(-1)
    return (plain.exp() * (plain - changed_BV.double().log_softmax(-1))).sum(-1)


@dataclass(frozen=True)
class Candidate:
    """Scores of one candidate direction, means over validation prompts.

    Args:
        layer: Layer at whose input it was found, from 0.
        position: Position, from the end of the prompt: -1 is its last token.
        ablated: Refusal score of unsafe prompts without the direction.
        induced: Refusal score of safe prompts with the direction added at its layer.
        kl: KL divergence on safe prompts between the network as it is and without the direction.
    """

    layer: int
    position: int
    ablated: float
    induced: float
    kl: float


@dataclass(frozen=True)
class Selection:
    """The chosen candidate, and why the others were left out.

    Args:
        best: The candidate of the lowest refusal score among those that passed; None if none did.
        left_out: Number of candidates by the first reason that applied.
    """

    best: Candidate | None
    left_out: dict[str, int]


def select_candidate(
    candidates: Sequence[Candidate], n_layers: int, max_kl: float = MAX_KL
) -> Selection:
    """Choose the direction whose removal ends refusals and changes little else (section 2.3).

    Left out are: scores that are not finite; the last fifth of the layers; a KL divergence on safe
    prompts above ``max_kl``; a direction that does not induce refusal (score below `MIN_INDUCED`).
    Of equal scores the first wins.
    """
    reasons = {"not finite": 0, "last layers": 0, "changes safe answers": 0, "induces nothing": 0}
    passed = []
    for candidate in candidates:
        reason = _reason_against(candidate, n_layers, max_kl)
        if reason is None:
            passed.append(candidate)
        else:
            reasons[reason] += 1
    best = min(passed, key=lambda candidate: candidate.ablated, default=None)
    return Selection(best, {reason: n for reason, n in reasons.items() if n})


def _reason_against(candidate: Candidate, n_layers: int, max_kl: float) -> str | None:
    scores = torch.tensor([candidate.ablated, candidate.induced, candidate.kl])
    if not scores.isfinite().all():
        return "not finite"
    if candidate.layer >= int(n_layers * (1 - LEAVE_OUT_LAYERS)):
        return "last layers"
    if candidate.kl > max_kl:
        return "changes safe answers"
    if candidate.induced < MIN_INDUCED:
        return "induces nothing"
    return None
