"""Losses on hidden states: keep them near the reference model's, or steer them to a fixed vector.

Shapes: `...` any leading dimensions, `T` time, `D` width.
"""

import torch
from torch import Tensor

from temper.losses.scores import Scores
from temper.losses.tokens import MeanTerms, upcast


def hidden_distance(policy: Scores, reference: Scores, layer: int | None = None) -> MeanTerms:
    """Mean squared distance of hidden states from the reference model's.

    ``mean ||h_l - h_ref_l||^2`` over attended positions. With a layer, it is the retain term of RMU
    (Li et al. 2024, arXiv 2403.03218); without one, the embedding difference. The norm is squared,
    and its gradient is 0 where policy and reference agree.

    Args:
        policy: Scores with hidden states.
        reference: Scores with hidden states of the same rows; they get no gradient.
        layer: Index into ``hidden`` (0 is the embeddings, l + 1 the output of decoder layer l);
            None is the mean over the outputs of all decoder layers.

    Returns:
        Sum over attended positions of the squared L2 norm over the width, and their number.
    """
    assert policy.hidden is not None and reference.hidden is not None
    layers = range(1, len(policy.hidden)) if layer is None else (layer,)
    distances = [
        (upcast(policy.hidden[i]) - upcast(reference.hidden[i]).detach()).square().sum(-1)
        for i in layers
    ]
    return _mean_over_attended(torch.stack(distances).mean(0), policy)


def steering(policy: Scores, target_D: Tensor, layer: int) -> MeanTerms:
    """Mean squared distance of hidden states from a fixed vector.

    ``mean ||h_l - target||^2`` over attended positions: the forget term of RMU (arXiv 2403.03218).

    Args:
        policy: Scores with hidden states.
        target_D: Vector that hidden states are steered to, ``c * u`` with a fixed unit vector u.
        layer: Index into ``hidden``, as in `hidden_distance`.
    """
    assert policy.hidden is not None
    hidden = upcast(policy.hidden[layer])
    return _mean_over_attended((hidden - target_D.to(hidden)).square().sum(-1), policy)


def _mean_over_attended(values: Tensor, policy: Scores) -> MeanTerms:
    assert policy.attended is not None
    return MeanTerms((values * policy.attended).sum(), policy.attended.sum())
