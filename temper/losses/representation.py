"""Losses on hidden states: keep them near the reference model's, or steer them to a fixed vector.

Shapes: `...` any leading dimensions, `T` time, `D` width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from temper.losses.scores import Scores
from temper.losses.tokens import MeanTerms, upcast


@dataclass(frozen=True)
class Average:
    """The positions that a mean over hidden states is about, and how they are weighed.

    Attributes:
        answers: Positions of labelled tokens alone; else all that are not padding.
        by_row: Mean over positions of each row, then over the rows that have some; else all
            positions weigh the same, so that long rows count more.
    """

    answers: bool = False
    by_row: bool = False

    def __call__(self, values: Tensor, policy: Scores) -> MeanTerms:
        """Terms of the mean of values, ``... x T``."""
        assert policy.attended is not None
        # The mask is that of predictions, one position before their tokens.
        mask = pad(policy.mask, (1, 0)) if self.answers else policy.attended
        sums = (values * mask).sum(-1)
        counts = mask.sum(-1)
        if not self.by_row:
            return MeanTerms(sums.sum(), counts.sum())
        return MeanTerms((sums / counts.clamp(min=1)).sum(), (counts > 0).sum())


EVERYWHERE = Average()


def hidden_distance(
    policy: Scores, reference: Scores, layer: int | None = None, average: Average = EVERYWHERE
) -> MeanTerms:
    """Mean squared distance of hidden states from the reference model's.

    ``mean ||h_l - h_ref_l||^2``. With a layer, it is the retain term of RMU
    (Li et al. 2024, arXiv 2403.03218); without one, the embedding difference. The norm is squared,
    and its gradient is 0 where policy and reference agree.

    Args:
        policy: Scores with hidden states.
        reference: Scores with hidden states of the same rows; they get no gradient.
        layer: Index into ``hidden`` (0 is the embeddings, l + 1 the output of decoder layer l);
            None is the mean over the outputs of all decoder layers.
        average: The mean over positions of the squared L2 norm over the width.
    """
    assert policy.hidden is not None and reference.hidden is not None
    layers = range(1, len(policy.hidden)) if layer is None else (layer,)
    distances = [
        (upcast(policy.hidden[i]) - upcast(reference.hidden[i]).detach()).square().sum(-1)
        for i in layers
    ]
    return average(torch.stack(distances).mean(0), policy)


def steering(
    policy: Scores, target_D: Tensor, layer: int, average: Average = EVERYWHERE
) -> MeanTerms:
    """Mean squared distance of hidden states from a fixed vector.

    ``mean ||h_l - target||^2``: the forget term of RMU (arXiv 2403.03218).

    Args:
        policy: Scores with hidden states.
        target_D: Vector that hidden states are steered to, ``c * u`` with a fixed unit vector u.
        layer: Index into ``hidden``, as in `hidden_distance`.
        average: The mean over positions.
    """
    assert policy.hidden is not None
    hidden = upcast(policy.hidden[layer])
    return average((hidden - target_D.to(hidden)).square().sum(-1), policy)
