"""Weight space of DeepSpeed ZeRO, stages 1 and 2.

Of `DeepSpeedZeroOptimizer` it uses ``averaged_gradients``, ``single_partition_of_fp32_groups``, ``parallel_partitioned_bit16_groups``,
``bit16_groups_flat``, ``round_robin_bit16_groups`` and ``_offsets``, ``real_dp_process_group``, ``cpu_offload``,
``micro_step_id`` (0.19).
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.vector import Vector
from strategies.weight_space import accumulated
from strategies.zero_spaces import Place, ZeROWeightSpace, refuse_skip

INITIAL_MICRO_STEP_ID = -1  # as after a step


class ZeRO12WeightSpace(ZeROWeightSpace):
    """Stages 1 and 2: all weights on every rank, gradients and exact weights in flat parts, one per rank.

    A parameter's entry in a vector is what of it lies in this rank's part: all, a piece, or nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        optimizer = self.engine.optimizer
        places: dict[int, Place] = {}
        for group, parameters in enumerate(optimizer.round_robin_bit16_groups):
            size = optimizer.single_partition_of_fp32_groups[group].numel()
            begin = self._rank(group) * size
            for parameter, offset in zip(parameters, optimizer.round_robin_bit16_offsets[group], strict=True):
                first, last = (min(max(place - begin, 0), size) for place in (offset, offset + parameter.numel()))
                start = min(max(begin - offset, 0), parameter.numel())
                places[id(parameter)] = Place(group, first, last, start)
        self.places = [places[id(parameter)] for parameter in self.parameters]

    def _rank(self, group: int) -> int:
        return dist.get_rank(group=self.engine.optimizer.real_dp_process_group[group])

    def _take_gradients(self, vector: Vector | None) -> Vector:
        optimizer = self.engine.optimizer
        parts = []
        for group, exact in enumerate(optimizer.single_partition_of_fp32_groups):
            if optimizer.cpu_offload:
                parts.append(exact.grad.detach().to(self.strategy.root_device, torch.float32, copy=True))  # type: ignore[union-attr]
            else:
                flat = torch.cat([piece.reshape(-1) for piece in optimizer.averaged_gradients[group]])
                parts.append(flat.to(torch.promote_types(flat.dtype, torch.float32)))
        return accumulated(vector, self._pieces(parts))

    def _forget_gradients(self) -> None:
        optimizer = self.engine.optimizer
        # Gradients of bfloat16 weights add up here, and offloaded ones there, until a step is taken; others do not.
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
        if optimizer.cpu_offload:
            optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
            torch._foreach_zero_([exact.grad for exact in optimizer.single_partition_of_fp32_groups])

    def assign(self, vector: Vector, skip: Collection[str] = ()) -> None:
        """Write into the parts that the optimizer's step reads."""
        refuse_skip(skip)
        optimizer = self.engine.optimizer
        exact = optimizer.single_partition_of_fp32_groups
        parts = [torch.zeros_like(part) for part in exact]
        torch._foreach_copy_(self._pieces(parts), vector.tensors)
        for group, part in enumerate(parts):
            if optimizer.cpu_offload:
                exact[group].grad.copy_(part)
            else:
                optimizer.averaged_gradients[group] = [part]

    def _held(self) -> list[Tensor]:
        optimizer = self.engine.optimizer
        return self._pieces([parts[self._rank(group)] for group, parts in enumerate(optimizer.parallel_partitioned_bit16_groups)])

    def _optimized(self) -> list[Tensor]:
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def _written(self) -> None:
        from deepspeed.runtime.utils import all_gather_dp_groups

        optimizer = self.engine.optimizer
        all_gather_dp_groups(
            groups_flat=optimizer.bit16_groups_flat,
            partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )
