"""FSDP2: every rank keeps a shard of every weight, gradient and optimizer state."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from strategies.sharded import ShardedWeightSpace
from strategies.weight_space import Vector, accumulate
from temper.models.blocks import decoder_layers
from temper.sharded_checkpoint import ShardedCheckpointMixin


class FSDP2Strategy(ShardedCheckpointMixin, ModelParallelStrategy):
    """Lightning strategy of FSDP2: a pass gathers decoder layers one at a time; gradients and
    optimizer state stay sharded.

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
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        """Shard the module's networks before the optimizer is made of their weights."""
        module: Any = self.lightning_module
        self.precision_plugin.convert_module(module)
        for network in module.networks():
            self.shard_network(network)
        super().setup(trainer)

    def shard_network(self, network: nn.Module) -> None:
        """Shard the weights of a network layer by layer, and move this rank's shards to its
        device.
        """
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        if isinstance(network, FSDPModule):  # by an earlier loop of the same Trainer
            return
        policy = MixedPrecisionPolicy()
        if self.gather_dtype is not None:
            policy = MixedPrecisionPolicy(
                getattr(torch, self.gather_dtype), torch.float32, cast_forward_inputs=False
            )
        # The root module too frees its gathered weights after a forward pass. By default it keeps
        # them for a backward pass; after a pass without one (a reference, generation), the next
        # pass would compute with weights gathered before a displacement.
        options: dict[str, Any] = {
            "mesh": self.device_mesh["data_parallel"],
            "mp_policy": policy,
            "reshard_after_forward": True,
        }
        for layer in decoder_layers(network):
            fully_shard(layer, **options)
        fully_shard(network, **options)

    def gather(self, parameter: Tensor) -> Tensor:
        """The whole weight, on every rank; all ranks call it."""
        whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        return whole.detach()

    @torch.no_grad()
    def write_whole(self, parameter: Tensor, whole: Tensor) -> None:
        """Write a whole weight into a sharded parameter."""
        start, stop = _range(parameter)
        _local_shard(parameter).view(-1).copy_(whole.reshape(-1)[start:stop])

    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that keeps the state."""
        return self.optimizers[0]


class FSDP2WeightSpace(ShardedWeightSpace):
    """Local shards of DTensors. Gradients arrive averaged over ranks (one reduce-scatter per layer
    and micro-batch).
    """

    def _take_gradients(self, vector: Vector | None) -> Vector:
        fresh = []
        for parameter, weight in zip(self.parameters, self._local_weights(), strict=True):
            if parameter.grad is None:
                gradient = torch.zeros_like(weight)
            else:
                gradient = _local_shard(parameter.grad)
            fresh.append(gradient.to(torch.promote_types(gradient.dtype, torch.float32)))
            parameter.grad = None
        return accumulate(vector, fresh)

    def assign(self, vector: Vector, skip: Collection[str] = ()) -> None:
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
    def frozen(self, parameters: Iterable[nn.Parameter] | None = None) -> Iterator[None]:
        """Nothing: FSDP2 fixes which gathered weights get a gradient when it first gathers them."""
        yield

    def _local_weights(self) -> list[Tensor]:
        return [_local_shard(parameter.detach()) for parameter in self.parameters]

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Ranges of whole rows, which `torch.chunk` shares out over ranks."""
        return {
            name: _range(parameter)
            for name, parameter in zip(self.names, self.parameters, strict=True)
        }

    def _optimizer_tensors(self) -> list[Tensor]:
        return list(self.parameters)

    def _flat_shards(self, tensors: list[Tensor]) -> list[Tensor]:
        return [_local_shard(tensor.detach()).view(-1) for tensor in tensors]

    def _owner(self, number: int) -> int:
        return number


def _local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor as it is."""
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard


def _range(parameter: Any) -> tuple[int, int]:
    """First and last element (exclusive) of this rank's rows, in the flattened weight."""
    if not hasattr(parameter, "placements"):
        return 0, parameter.numel()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    width = parameter.numel() // max(parameter.shape[0], 1)
    return offset[0] * width, (offset[0] + shape[0]) * width
