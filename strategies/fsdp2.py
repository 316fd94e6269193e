"""Fully sharded weights (FSDP2): every rank keeps a slice of every weight, optimizer state and
gradient.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from strategies.parts import PartsCheckpoints
from strategies.sharded import ShardedWeightSpace
from strategies.weight_space import Vector, accumulated
from temper.models.blocks import decoder_layers


class FSDP2Strategy(PartsCheckpoints, ModelParallelStrategy):
    """FSDP2: decoder layers are gathered one at a time for a pass, everything else is kept in
    slices.

    Args:
        gather_dtype: Data type in which weights are gathered and forward passes compute.
            ``bfloat16`` halves the traffic of float32 weights; gradients are summed over ranks in
            float32. None: as the weights are.
        timeout_minutes: How long a rank waits for another one before the job fails.
    """

    shards_weights = True

    def __init__(
        self,
        gather_dtype: Literal["bfloat16", "float32"] | None = None,
        timeout_minutes: float = 30,
    ) -> None:
        super().__init__(timeout=timedelta(minutes=timeout_minutes))
        self.gather_dtype = gather_dtype

    def setup_environment(self) -> None:
        """All ranks share one dimension: no tensor parallelism."""
        self._data_parallel_size, self._tensor_parallel_size = (
            self.num_nodes * self.num_processes,
            1,
        )
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        """Cut the module's networks into slices before anything is made of their weights."""
        module: Any = self.lightning_module
        self.precision_plugin.convert_module(module)
        for network in module.networks():
            self.shard_network(network)
        super().setup(trainer)

    def shard_network(self, network: nn.Module) -> None:
        """Cut the weights of a network into slices, layer by layer, and move this rank's to its
        device.
        """
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        if isinstance(network, FSDPModule):  # of an earlier loop of the same Trainer
            return
        policy = MixedPrecisionPolicy()
        if self.gather_dtype is not None:
            policy = MixedPrecisionPolicy(
                getattr(torch, self.gather_dtype), torch.float32, cast_forward_inputs=False
            )
        # The outermost part too gives its weights back after a forward pass. By default it waits
        # for a backward one, and after a pass without (a reference, an answer) the next one would
        # compute with weights from before a displacement.
        options: dict[str, Any] = {
            "mesh": self.device_mesh["data_parallel"],
            "mp_policy": policy,
            "reshard_after_forward": True,
        }
        for layer in decoder_layers(network):
            fully_shard(layer, **options)
        fully_shard(network, **options)

    def gather(self, parameter: Tensor) -> Tensor:
        """A whole weight, on every rank."""
        whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter  # type: ignore[operator]
        return whole.detach()

    @torch.no_grad()
    def put(self, parameter: Tensor, whole: Tensor) -> None:
        """Write a whole weight."""
        start, stop = _range(parameter)
        _local(parameter).view(-1).copy_(whole.reshape(-1)[start:stop])

    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that keeps the state."""
        return self.optimizers[0]


class FSDP2WeightSpace(ShardedWeightSpace):
    """Slices of DTensors. Gradients arrive averaged over ranks (one reduce-scatter per layer and
    micro-batch).
    """

    def _take_gradients(self, vector: Vector | None) -> Vector:
        fresh = []
        for parameter, held in zip(self.parameters, self._held(), strict=True):
            gradient = torch.zeros_like(held) if parameter.grad is None else _local(parameter.grad)
            fresh.append(gradient.to(torch.promote_types(gradient.dtype, torch.float32)))
            parameter.grad = None
        return accumulated(vector, fresh)

    def assign(self, vector: Vector, skip: Any = ()) -> None:
        """As for whole weights; the optimizer sees DTensors."""
        from torch.distributed.tensor import DTensor

        for name, parameter, gradient in zip(self.names, self.parameters, vector, strict=True):
            if name in skip:
                parameter.grad = None
            elif isinstance(parameter, DTensor):
                local = gradient.to(parameter.dtype)
                parameter.grad = DTensor.from_local(
                    local,
                    parameter.device_mesh,
                    parameter.placements,
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
            else:
                parameter.grad = gradient.to(parameter.dtype)

    @contextmanager
    def frozen(self, parameters: Any = None) -> Iterator[None]:
        """Nothing: a gathered weight learns or not as it did when it was gathered for the first
        time.
        """
        yield

    def _held(self) -> list[Tensor]:
        return [_local(parameter.detach()) for parameter in self.parameters]

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Whole rows, as `torch.chunk` cuts them."""
        return {
            name: _range(parameter)
            for name, parameter in zip(self.names, self.parameters, strict=True)
        }

    def _optimized(self) -> list[Tensor]:
        return list(self.parameters)

    def _pieces(self, likes: list[Tensor]) -> list[Tensor]:
        return [_local(like.detach()).view(-1) for like in likes]

    def _owner(self, number: int) -> int:
        return number


def _local(tensor: Tensor) -> Tensor:
    """This rank's slice."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator,no-any-return]


def _range(parameter: Any) -> tuple[int, int]:
    """First and last element of this rank's rows, in the flattened weight."""
    if not hasattr(parameter, "placements"):
        return 0, parameter.numel()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    width = parameter.numel() // max(parameter.shape[0], 1)
    return offset[0] * width, (offset[0] + shape[0]) * width
