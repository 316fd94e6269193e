"""Activation steering of Safety Arithmetic, step 2: turn MLP outputs away from harmful compliance.

Hazra et al. 2024, arXiv 2406.11801, after in-context vectors (Liu et al. 2023, arXiv 2311.06668).

Shapes: `N` pairs of demonstrations, `B` rows, `T` time, `D` width, `L` layers.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from temper.models.blocks import decoder_layers, mlp_blocks
from temper.models.capture import change_output, exact, record_outputs

SteeringVectors = Tensor  # L x D


def steer(x: Tensor, v_D: Tensor, alpha: float) -> Tensor:
    """Rotate x away from v at constant norm.

    ``x' = ||x|| N(N(x) - 0.1 alpha (1 + max(0, cos(x, v))) N(v))``, where N normalises the last
    dimension to L2 norm 1. Computed in at least float32. alpha = 0 is the identity, bit for bit.

    Args:
        x: Outputs of an MLP block, ``... x D``.
        v_D: Steering vector of the layer, from safe to unsafe.
        alpha: Strength (official code: 0.12).
    """
    if alpha == 0:
        return x
    x_exact = exact(x)
    v_D = v_D.to(x_exact)
    cosine = F.cosine_similarity(x_exact, v_D, dim=-1)
    strength = 0.1 * alpha * (1 + cosine.clamp(min=0)).unsqueeze(-1)
    turned = F.normalize(F.normalize(x_exact, dim=-1) - strength * F.normalize(v_D, dim=-1), dim=-1)
    steered: Tensor = (x_exact.norm(dim=-1, keepdim=True) * turned).to(x.dtype)
    return steered


def steering_vectors(differences_NLD: Tensor) -> SteeringVectors:
    """Steering vectors: first principal component plus mean of (unsafe - safe) hidden states.

    Over all layers at once, as in the official code. The sign of a principal component is
    arbitrary: it is chosen to point along the mean, towards unsafe. (The official code fixes it
    otherwise: the demonstration with the largest projection is positive.)

    Args:
        differences_NLD: Hidden states of the unsafe demonstration minus those of the safe one; at
            least two pairs.

    Returns:
        ``L x D``.
    """
    flat = differences_NLD.flatten(1)
    mean = flat.mean(0)
    component = torch.linalg.svd(flat - mean, full_matrices=False).Vh[0]
    component = torch.where(component @ mean < 0, -component, component)
    return (component + mean).view(differences_NLD.shape[1:])


@torch.no_grad()
def hidden_differences(network: nn.Module, pairs: dict[str, Tensor], n_tokens: int) -> Tensor:
    """(unsafe - safe) hidden states of pairs of demonstrations.

    A hidden state is the output of a decoder layer, averaged over a demonstration's last tokens.

    Args:
        network: A causal LM; its training mode is restored.
        pairs: ``input_ids`` and ``attention_mask``, ``N x 2 x T``: the unsafe demonstration, then
            the safe one.
        n_tokens: Tokens at the end of a demonstration that are averaged (official code: 4).

    Returns:
        ``N x L x D``, at least float32.
    """
    was_training = network.training
    ids = pairs["input_ids"].flatten(0, 1)
    attention = pairs["attention_mask"].flatten(0, 1)
    try:
        network.eval()
        with record_outputs(decoder_layers(network)) as outputs:
            network(input_ids=ids, attention_mask=attention)
    finally:
        network.train(was_training)
    # Position counted from the end of a row: 1 is its last token, on whichever side it is padded.
    from_end = attention.flip(-1).cumsum(-1).flip(-1) * attention
    last = (from_end > 0) & (from_end <= n_tokens)
    stacked = torch.stack([exact(h) for h in outputs], dim=1)
    weights = (last / last.sum(-1, keepdim=True)).to(stacked)
    means = torch.einsum("bltd,bt->bld", stacked, weights)
    return means[0::2] - means[1::2]


def add_steering(
    network: nn.Module, vectors: SteeringVectors, alpha: float
) -> list[RemovableHandle]:
    """Steer the output of every MLP block until the returned hooks are removed."""
    return [
        change_output(block, partial(steer, v_D=v_D, alpha=alpha))
        for block, v_D in zip(mlp_blocks(network), vectors, strict=True)
    ]
