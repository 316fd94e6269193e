"""Random answers for the tests of unlearning metrics: log-probabilities, hits and masks."""

import torch
from hypothesis import strategies as st
from torch import Tensor

N = 13
K = 3
T = 9
SEEDS = st.integers(0, 10**6)


def random_answers(seed: int, certainty: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """logps_NKT (float64 nats), hits_NKT and mask_NKT: answers of 0 to 7 tokens somewhere in the
    row; garbage where masked.
    """
    generator = torch.Generator().manual_seed(seed)
    logps = -certainty * torch.rand(N, K, T, generator=generator, dtype=torch.float64)
    hits = torch.rand(N, K, T, generator=generator) < 0.6
    start = torch.randint(0, 3, (N, K, 1), generator=generator)
    length = torch.randint(0, 8, (N, K, 1), generator=generator)
    mask = (torch.arange(T) >= start) & (torch.arange(T) < start + length)
    return torch.where(mask, logps, torch.nan), hits, mask


def unmasked(values: Tensor, mask: Tensor) -> list[list[float]]:
    """The values of every answer where the mask is true."""
    return [
        [float(v) for v, m in zip(row, kept, strict=True) if m]
        for row, kept in zip(values, mask, strict=True)
    ]
