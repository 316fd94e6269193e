"""Per-token log-probabilities, and the one definition of a mean over tokens.

Shapes: `B` batch, `T` time, `V` vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100


class MeanTerms(NamedTuple):
    """A mean kept as its numerator and denominator, so that it can be finished globally.

    The loss of a step is ``sum(total) / sum(count)`` over all micro-batches and ranks: 8 rows at
    once, 8 times 1 row and 2 ranks of 4 rows are the same loss whatever their lengths.

    Args:
        total: Scalar with gradient, nats.
        count: Scalar without gradient: unmasked tokens (or sequences, for a loss per sequence).
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count on purpose


def token_logps(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of every label under the logits one position earlier.

    Args:
        logits_BTV: Raw scores; position t predicts token t + 1.
        labels_BT: Token ids, `IGNORE_INDEX` where the token does not count.

    Returns:
        logps_BT (nats, T - 1 positions, 0 where masked) and mask_BT (bool).
    """
    targets_BT = labels_BT[:, 1:]
    mask_BT = targets_BT != IGNORE_INDEX
    nll_BT = F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).to(torch.promote_types(logits_BTV.dtype, torch.float32)),
        targets_BT.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    return -nll_BT.view_as(targets_BT), mask_BT


def nll(logps_BT: Tensor, mask_BT: Tensor) -> MeanTerms:
    """Negative log-likelihood per unmasked token: ``-sum(mask * logps) / sum(mask)``, in nats."""
    return MeanTerms(-(logps_BT * mask_BT).sum(), mask_BT.sum())
