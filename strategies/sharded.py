"""Weights sharded over ranks: what the weight spaces of FSDP2 and ZeRO share, and a whole network
gathered from its shards.
"""

from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.weight_space import Vector, WeightSpace
from temper.models import build_network
from temper.sharded_checkpoint import ShardedParameters


class ShardedWeightSpace(WeightSpace, ShardedParameters):
    """Vectors hold this rank's shard of every gradient, already averaged over ranks: only small
    sums are left to reduce.
    """

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size()

    def norm(self, vector: Vector) -> Tensor:
        """Global L2 norm over the shards of all ranks: one all-reduce of a single number."""
        squares = torch.stack(torch._foreach_norm(vector.tensors)).square().sum()
        return self.sum_over_shards(squares).sqrt()

    def global_sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        dist.all_reduce(values)
        return values

    def sum_over_shards(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        dist.all_reduce(values)
        return values

    def _master_weights_changed(self) -> None:
        self._local_weights_changed()


def whole_network(trainer: L.Trainer, module: Any) -> nn.Module | None:
    """The module's network; where its weights are sharded, a copy on the CPU with whole weights.

    All ranks call it. The copy is built again on the first rank, where frozen weights are read from
    their source and trained ones are gathered one at a time, so one rank's host memory holds one
    copy of the network and no device more than one whole weight.

    Returns:
        The network; None on the other ranks where weights are sharded.
    """
    strategy: Any = trainer.strategy
    if not getattr(strategy, "shards_weights", False):
        network: nn.Module = module.network
        return network
    trained: dict[str, Tensor] = {}
    for name, parameter in module.network.named_parameters():
        if parameter.requires_grad:
            whole = strategy.gather(parameter)
            if trainer.is_global_zero:
                trained[name] = whole.cpu()
    if not trainer.is_global_zero:
        return None
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        copy = build_network(module.network_spec, datamodule.tokenizer)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if name in trained:
                parameter.copy_(trained.pop(name))
    assert not trained, f"trained weights that the rebuilt network lacks: {sorted(trained)}"
    return copy
