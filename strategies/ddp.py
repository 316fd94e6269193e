"""Weight space of replicated weights: every rank holds all of them, gradients are averaged."""

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.weight_space import Vector, WeightSpace


class DDPWeightSpace(WeightSpace):
    """Replicated weights. One flat all-reduce per `reduce`, so the collectives of a step are
    countable.

    Backward passes call autograd directly, which leaves DistributedDataParallel's own reducer
    idle; the wrapper is used for what it does at start-up (same weights on every rank).
    """

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size()

    def reduce(self, vector: Vector) -> Vector:
        """Mean over ranks in one all-reduce per data type; the result is views of flat buffers."""
        reduced: list[Tensor] = [torch.empty(0)] * len(vector.tensors)
        # Data types in the order of the vector, which is the same on every rank.
        for dtype in dict.fromkeys(tensor.dtype for tensor in vector):
            indices = [i for i, tensor in enumerate(vector) if tensor.dtype == dtype]
            flat = torch.cat([vector.tensors[i].reshape(-1) for i in indices])
            dist.all_reduce(flat)
            flat.div_(self.world_size)
            sections = torch.split(flat, [vector.tensors[i].numel() for i in indices])
            for i, section in zip(indices, sections, strict=True):
                reduced[i] = section.view_as(vector.tensors[i])
        return Vector(reduced)

    def global_sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        dist.all_reduce(values)
        return values
