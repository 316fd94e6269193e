"""Losses of TAR: entropy or DPO after tampering, and hidden states kept near the reference.

Shapes: `...` any leading dimensions, `T` time, `D` width, `V` vocabulary.
"""

import torch
from torch import Tensor

from temper.losses.preference import PairSettings, sigmoid
from temper.losses.scores import Scores, SequenceScores
from temper.losses.tokens import MeanTerms, mean_of, upcast


def negative_entropy(scores: Scores) -> MeanTerms:
    """Negative entropy ``-H = sum_v p_v log p_v`` per labelled token, in nats, in [-log V, 0].

    TAR (Tamirisa et al. 2024, arXiv 2408.00761), section 4.2. It is smallest for a uniform
    distribution over the vocabulary.

    Args:
        scores: Scores with logits.
    """
    assert scores.logits is not None
    logps = upcast(scores.logits).log_softmax(-1)
    return MeanTerms(((logps.exp() * logps).sum(-1) * scores.mask).sum(), scores.mask.sum())


def dpo_loss(policy: Scores, reference: Scores | SequenceScores, beta: float) -> MeanTerms:
    """DPO loss of pairs whose first answer is the chosen one: mean over pairs.

    ``-log sigma(beta * (l_0 - ref_0 - l_1 + ref_1))``

    Args:
        policy: Scores of pairs, ``B x 2``.
        reference: Scores of the same pairs under the reference model.
        beta: Scale of the log-probability ratios.
    """
    ratios: Tensor = policy.sums - reference.sums
    return mean_of(sigmoid(ratios[:, 0], ratios[:, 1], PairSettings(beta)))


def hidden_shift(policy: Scores, reference: Scores) -> MeanTerms:
    """Mean distance of hidden states, embeddings included, from the reference model's.

    ``mean ||h_l,t - ref h_l,t||_2`` over hidden states and attended positions: TAR's retain term.
    The norm is not squared: its gradient is a unit vector however near the reference is, and 0
    where both agree exactly, as they do before the first step.

    Args:
        policy: Scores with hidden states ``... x T x D``.
        reference: Scores with hidden states of the same rows; they get no gradient.

    Returns:
        Sum over attended positions of the mean over hidden states, and the number of positions.
    """
    assert policy.hidden is not None and policy.attended is not None
    assert reference.hidden is not None
    pairs = zip(policy.hidden, reference.hidden, strict=True)
    shifts = [
        torch.linalg.vector_norm(upcast(mine) - upcast(theirs).detach(), dim=-1)
        for mine, theirs in pairs
    ]
    return MeanTerms((torch.stack(shifts).mean(0) * policy.attended).sum(), policy.attended.sum())
