"""A direction in weight space: one tensor per trainable parameter, this rank's part of it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Vector:
    """Tensors that are added and scaled as one, in place (a copy of 7B weights is 27 GB).

    Args:
        tensors: fp32 (fp64 for fp64 parameters), in the order of the weight space's parameters.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def add_(self, other: "Vector") -> "Vector":
        """``self + other``, in place."""
        torch._foreach_add_(self.tensors, other.tensors)
        return self

    def sub_(self, other: "Vector") -> "Vector":
        """``self - other``, in place."""
        torch._foreach_sub_(self.tensors, other.tensors)
        return self

    def mul_(self, factor: float | Tensor) -> "Vector":
        """``factor * self``, in place; a tensor factor costs no host synchronisation."""
        torch._foreach_mul_(self.tensors, factor)
        return self

    def to(self, device: torch.device) -> "Vector":
        """The same on a device."""
        return Vector([tensor.to(device) for tensor in self.tensors])

    def clone(self) -> "Vector":
        """A copy that shares nothing."""
        return Vector([tensor.clone() for tensor in self.tensors])
