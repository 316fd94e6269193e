"""What TAR wants of a model: to know nothing after tampering, or prefer the refusal; and to be
itself before.

Shapes: `...` any leading dimensions, `T` time, `D` width, `V` vocabulary.
"""

import torch
from torch import Tensor

from temper.losses.preference import PairSettings, sigmoid
from temper.losses.scores import Scores, SequenceScores
from temper.losses.tokens import MeanTerms, exact, mean_of


def negative_entropy(scores: Scores) -> MeanTerms:
    """``-H = sum_v p_v log p_v`` per labelled token over the whole vocabulary, in nats, in [-log V,
    0]; needs logits.

    TAR (Tamirisa et al. 2024, arXiv 2408.00761), section 4.2: its minimum is a uniform
    distribution.
    """
    assert scores.logits is not None
    logps = exact(scores.logits).log_softmax(-1)
    return MeanTerms(((logps.exp() * logps).sum(-1) * scores.mask).sum(), scores.mask.sum())


def dpo_loss(policy: Scores, reference: Scores | SequenceScores, beta: float) -> MeanTerms:
    """DPO of pairs, ``-log sigma(beta * (l_0 - ref_0 - l_1 + ref_1))``: mean over pairs whose first
    answer is preferred.

    Args:
        policy: Scores of pairs, ``B x 2``.
        reference: The same under the reference model.
        beta: How much of a margin, per nat, is worth having.
    """
    gain: Tensor = policy.sums - reference.sums
    return mean_of(sigmoid(gain[:, 0], gain[:, 1], PairSettings(beta)))


def hidden_shift(policy: Scores, reference: Scores) -> MeanTerms:
    """``mean ||h_l,t - ref h_l,t||_2`` over hidden states, embeddings included, and attended
    positions.

    TAR's retain term. The norm is not squared: its gradient is a unit vector however near the
    reference is, and 0 where both agree exactly, as they do before the first step.

    Args:
        policy: With hidden states ``... x T x D``.
        reference: With hidden states of the same rows; no gradient reaches them.

    Returns:
        Sum over attended positions of the mean over hidden states, and the number of positions.
    """
    assert (
        policy.hidden is not None and reference.hidden is not None and policy.attended is not None
    )
    pairs = zip(policy.hidden, reference.hidden, strict=True)
    shifts = [
        torch.linalg.vector_norm(exact(mine) - exact(theirs).detach(), dim=-1)
        for mine, theirs in pairs
    ]
    return MeanTerms((torch.stack(shifts).mean(0) * policy.attended).sum(), policy.attended.sum())
