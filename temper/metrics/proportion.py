"""A share of cases, with its interval."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

Z_95 = 1.959963984540054


def wilson_interval(hits: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson (1927) score interval of a proportion; (0, 1) when there are no cases.

    ``(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`` with ``p = hits / n``.
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = hits / n, z * z
    centre = p + z2 / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low, high = (centre - spread) / (1 + z2 / n), (centre + spread) / (1 + z2 / n)
    # At 0 and n hits the exact bound is 0 and 1; rounding would leave 1e-17 beside it.
    return (0.0 if hits == 0 else max(0.0, low)), (1.0 if hits == n else min(1.0, high))


class Proportion(Metric):
    """Hits over cases, summed over ranks."""

    full_state_update = False
    higher_is_better: bool | None = None
    hits: Tensor
    cases: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("cases", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, flags: Tensor) -> None:
        """Count a batch of cases (bool, any shape)."""
        self.hits += flags.sum().to(self.hits)
        self.cases += flags.numel()

    def compute(self) -> dict[str, float]:
        """``value`` in [0, 1] (NaN without cases), ``ci_low``, ``ci_high`` (95 % Wilson), ``n``."""
        hits, n = int(self.hits), int(self.cases)
        low, high = wilson_interval(hits, n)
        return {"value": hits / n if n else math.nan, "ci_low": low, "ci_high": high, "n": n}
