"""Losses on hidden states: keep them where they were, or steer them to a fixed point.

Shapes: `...` any leading dimensions, `T` time, `D` width.
"""

import torch
from torch import Tensor

from temper.losses.scores import Scores
from temper.losses.tokens import MeanTerms, exact


def hidden_distance(policy: Scores, reference: Scores, layer: int | None = None) -> MeanTerms:
    """``mean ||h_l - h_ref_l||^2`` over attended positions: how far hidden states have moved.

    The retain term of RMU (Li et al. 2024, arXiv 2403.03218) with a layer, and the embedding
    difference with none. The norm is squared and its gradient is 0 where policy and reference
    agree.

    Args:
        policy: With hidden states.
        reference: With hidden states of the same rows; no gradient reaches them.
        layer: Index into ``hidden`` (0 is the embeddings, l + 1 the output of decoder layer l);
            None is the mean over the outputs of all decoder layers.

    Returns:
        Sum over attended positions of the squared L2 norm over the width, and their number.
    """
    assert policy.hidden is not None and reference.hidden is not None
    layers = range(1, len(policy.hidden)) if layer is None else (layer,)
    distances = [
        (exact(policy.hidden[i]) - exact(reference.hidden[i]).detach()).square().sum(-1)
        for i in layers
    ]
    return _over_attended(torch.stack(distances).mean(0), policy)


def steering(policy: Scores, target_D: Tensor, layer: int) -> MeanTerms:
    """``mean ||h_l - target||^2`` over attended positions: the forget term of RMU (arXiv
    2403.03218).

    Args:
        policy: With hidden states.
        target_D: Where every hidden state is drawn to, ``c * u`` with a fixed unit vector u.
        layer: Index into ``hidden``, as in `hidden_distance`.
    """
    assert policy.hidden is not None
    hidden = exact(policy.hidden[layer])
    return _over_attended((hidden - target_D.to(hidden)).square().sum(-1), policy)


def _over_attended(values: Tensor, policy: Scores) -> MeanTerms:
    assert policy.attended is not None
    return MeanTerms((values * policy.attended).sum(), policy.attended.sum())
