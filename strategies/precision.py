"""Whether weights went where a displacement should have taken them: low precision may be too coarse."""

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from strategies.vector import Vector

FAITHFUL = 0.99  # least cosine that passes without a warning


def step_products(parameters: Sequence[Tensor], before: Sequence[Tensor], direction: Vector, scale: Tensor | float) -> Tensor:
    """``<s, m>``, ``<s, s>`` and ``<m, m>`` of the step ``s = scale * direction`` and what was made of it, m; to be summed over shards."""
    sums = []
    for parameter, start, step in zip(parameters, before, direction, strict=True):
        intended, made = step * scale, parameter.to(step) - start.to(step)
        sums.append(torch.stack([(intended * made).sum(), intended.square().sum(), made.square().sum()]))
    return torch.stack(sums).sum(0)


def checked_cosine(products: Tensor, parameters: Sequence[Tensor]) -> Tensor | None:
    """Cosine between a step and what was made of it, with a warning if it is low; None for a step of zeros or nan.

    Synchronises with the device. (bf16 has 8 bits: adding 0.1 / sqrt(7e9) to weights of 0.02 leaves most as they were.)
    """
    both, of_intended, of_made = products
    cosine = both / (of_intended.sqrt() * of_made.sqrt()).clamp_min(torch.finfo(both.dtype).tiny)
    if not (of_intended > 0 and cosine.isfinite()):
        return None
    if cosine < FAITHFUL:
        kinds = ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters}))
        rank_zero_warn(
            f"the perturbation of the weights is not the one that was asked for: cosine {float(cosine):.3f} between the two. Weights in "
            f"{kinds} are too coarse for a step of length {float(of_intended.sqrt()):.3g} over {sum(p.numel() for p in parameters):,}. "
            "Train LoRA adapters (always fp32), or set model.init_args.network.dtype=float32 (and trainer.precision=bf16-mixed for speed)"
        )
    return cosine
