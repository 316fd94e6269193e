"""Weight space of DeepSpeed ZeRO, stage 3.

Of `DeepSpeedZeroOptimizer_Stage3` it uses ``grad_position``, ``fp32_partitioned_groups_flat``, ``empty_partition_cache``; of a parameter
``ds_tensor``, ``ds_numel``, ``ds_process_group``; and the local getters and setters of ``deepspeed.utils`` (0.19).
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.vector import Vector
from strategies.weight_space import accumulated
from strategies.zero_spaces import Place, ZeROWeightSpace, refuse_skip


class ZeRO3WeightSpace(ZeROWeightSpace):
    """Stage 3: each rank has its slice of every parameter, the last ranks' padded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.places = [self._place(parameter) for parameter in self.parameters]

    def _place(self, parameter: Any) -> Place:
        optimizer = self.engine.optimizer
        group, first, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = min(dist.get_rank(group=parameter.ds_process_group) * size, parameter.ds_numel)
        return Place(group, first, first + size, start)

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Without the padding."""
        sizes = [parameter.ds_numel for parameter in self.parameters]  # type: ignore[attr-defined]
        return {name: (start, min(stop, size)) for (name, (start, stop)), size in zip(super().ranges().items(), sizes, strict=True)}

    def _take_gradients(self, vector: Vector | None) -> Vector:
        from deepspeed.utils import safe_get_local_grad

        fresh = []
        for parameter, held in zip(self.parameters, self._held(), strict=True):
            gradient = safe_get_local_grad(parameter)  # none where the weight is frozen for the moment
            fresh.append(torch.zeros_like(held, dtype=torch.float32) if gradient is None else gradient.detach().float().clone())
        return accumulated(vector, fresh)

    def _forget_gradients(self) -> None:
        from deepspeed.utils import safe_set_local_grad

        for parameter, held in zip(self.parameters, self._held(), strict=True):
            safe_set_local_grad(parameter, torch.zeros_like(held))

    def assign(self, vector: Vector, skip: Collection[str] = ()) -> None:
        """Write into the slices that the optimizer's step reads."""
        from deepspeed.utils import safe_set_local_grad

        refuse_skip(skip)
        for parameter, gradient in zip(self.parameters, vector, strict=True):
            safe_set_local_grad(parameter, gradient)

    def _held(self) -> list[Tensor]:
        return [parameter.ds_tensor.data.view(-1) for parameter in self.parameters]  # type: ignore[attr-defined]

    def _optimized(self) -> list[Tensor]:
        return list(self.engine.optimizer.fp32_partitioned_groups_flat)

    def _written(self) -> None:
        # What was gathered for a pass and not given back yet holds the weights of before.
        self.engine.optimizer.empty_partition_cache()
