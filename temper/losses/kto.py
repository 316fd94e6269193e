"""KTO: a loss over single answers, each marked desirable or undesirable.

Shapes: `N` answers. Log-probability ratios ``l(y|x) - l_ref(y|x)`` are in nats.
"""

import torch
from torch import Tensor


def kto_losses(
    ratios_N: Tensor,
    desirable_N: Tensor,
    z: Tensor,
    beta: float = 0.1,
    w_desirable: float = 1.0,
    w_undesirable: float = 1.0,
) -> Tensor:
    """Compute the KTO loss of every answer.

    ``w_d (1 - sigma(b (c - z)))`` if desirable, else ``w_u (1 - sigma(b (z - r)))``

    Ethayarajh et al. 2024, arXiv 2402.01306, equation 8, without the constants ``lambda_y`` that do
    not depend on the policy; c and r are the log-probability ratios of desirable and undesirable
    answers.

    Args:
        ratios_N: ``l(y|x) - l_ref(y|x)`` of every answer.
        desirable_N: bool.
        z: Reference point in nats, a scalar without gradient (`reference_point`).
        beta: Scale of the ratios.
        w_desirable: Weight of desirable answers.
        w_undesirable: Weight of undesirable answers.

    Returns:
        Losses, ``N``, between 0 and the weight.
    """
    losses_N = 1 - torch.sigmoid(beta * torch.where(desirable_N, ratios_N - z, z - ratios_N))
    return torch.where(desirable_N, w_desirable * losses_N, w_undesirable * losses_N)


def reference_point(total: Tensor, count: Tensor) -> Tensor:
    """Estimate ``KL(policy || reference)`` for the KTO loss, without gradient.

    ``z = max(0, mean of l(y'|x) - l_ref(y'|x))`` over mismatched answers y'

    Args:
        total: Sum of the ratios over all answers of the global batch, nats.
        count: Number of answers.

    Returns:
        z, a scalar in nats.
    """
    return (total / count).clamp(min=0).detach()
