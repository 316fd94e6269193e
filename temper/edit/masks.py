"""Masks over weights: what Antidote zeroes and what SOMF fuses. Pure functions of tensors.

Shapes: `O` outputs of a linear layer, `I` inputs; `...` any.
"""

import torch
from torch import Tensor


def wanda_top(weight_OI: Tensor, mean_square_I: Tensor, ratio: float) -> Tensor:
    """Entries with the highest Wanda scores of their row: ``|W| * sqrt(mean x^2)`` (Sun et al. 2023, arXiv 2306.11695).

    Args:
        weight_OI: Weight of a linear layer; a row is one output.
        mean_square_I: Mean square of each input, over tokens. Its scale does not matter.
        ratio: Share of a row, rounded up to whole entries: ``I - floor(I * (1 - ratio))``, as in Antidote's code.

    Returns:
        ``O x I``, bool: the top of every row; of equal scores the one further right.
    """
    n_inputs = weight_OI.shape[1]
    n_top = n_inputs - int(n_inputs * (1 - ratio))
    score_OI = weight_OI.abs() * mean_square_I.sqrt()
    order = score_OI.argsort(dim=1, stable=True)
    return torch.zeros_like(weight_OI, dtype=torch.bool).scatter_(1, order[:, n_inputs - n_top :], True)


def relaxed_bernoulli(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """A sample of the relaxed Bernoulli distribution (Maddison et al. 2016): ``sigmoid((logits + logit(u)) / temperature)``.

    Args:
        logits: Log-odds of each entry.
        uniform: Numbers in [0, 1) of the same shape.
        temperature: Towards 0, samples are 0 or 1.
    """
    tiny = torch.finfo(uniform.dtype).eps
    return torch.sigmoid((logits + uniform.clamp(tiny, 1 - tiny).logit()) / temperature)


def fuse(safe: Tensor, tau: Tensor, mask: Tensor, w: float) -> Tensor:
    """``safe + w * mask * tau / mean(mask)``: a task vector through a mask, on a safe model (SOMF).

    Args:
        safe: Weight of the safe model.
        tau: Task vector: fine-tuned weight minus safe weight.
        mask: Entries in [0, 1]; its mean is over this one tensor.
        w: Strength.
    """
    return safe + w * mask * tau / mask.mean()
