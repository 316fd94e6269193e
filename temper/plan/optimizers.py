"""How much state an optimizer keeps per weight, by trying it on a small one."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SIZE = 512  # a matrix of SIZE x SIZE: large enough that 8-bit optimizers use 8 bits, and that their tables do not count


def state_bytes(make: Callable[[Any], torch.optim.Optimizer], dtype: torch.dtype = torch.float32) -> float:
    """Bytes of optimizer state per trained weight, after a step.

    Args:
        make: Makes the optimizer of a list of parameters.
        dtype: Of the weights.
    """
    weight = nn.Parameter(torch.zeros(SIZE, SIZE, dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # paged optimizers say that there is no GPU here
        optimizer = make([weight])
        weight.grad = torch.full_like(weight, 1e-3)
        optimizer.step()
    kept = {value.data_ptr(): value for value in _tensors(optimizer.state[weight]) if value.numel() > 1}
    return sum(value.numel() * value.element_size() for value in kept.values()) / SIZE**2


def _tensors(state: Any) -> list[Tensor]:
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else []
    return [state] if isinstance(state, Tensor) else [tensor for value in values for tensor in _tensors(value)]
