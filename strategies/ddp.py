"""Weight space of replicated weights: every rank holds all of them, gradients are averaged."""

from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.weight_space import Vector, WeightSpace
from temper.models import build_network


class DDPWeightSpace(WeightSpace):
    """Replicated weights. One flat all-reduce per `reduce`, so the collectives of a step are
    countable.

    Backward passes call autograd directly, which leaves DistributedDataParallel's own reducer
    idle; the wrapper is used for what it does at start-up (same weights on every rank).
    """

    @property
    def world_size(self) -> int:  # type: ignore[override]
        """Number of ranks."""
        return dist.get_world_size()

    def reduce(self, vector: Vector) -> Vector:
        """Mean over ranks in one all-reduce per data type; the result is views of flat buffers."""
        reduced: list[Tensor] = [torch.empty(0)] * len(vector.tensors)
        for dtype in dict.fromkeys(
            tensor.dtype for tensor in vector
        ):  # in the same order on every rank
            places = [i for i, tensor in enumerate(vector) if tensor.dtype == dtype]
            flat = torch.cat([vector.tensors[i].reshape(-1) for i in places])
            dist.all_reduce(flat)
            flat.div_(self.world_size)
            pieces = flat.split([vector.tensors[i].numel() for i in places])
            for i, piece in zip(places, pieces, strict=True):
                reduced[i] = piece.view_as(vector.tensors[i])
        return Vector(reduced)

    def global_sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        dist.all_reduce(values)
        return values


# MERGED from strategies.ddp: A whole network out of one whose weights are cut over ranks.


def whole_network(trainer: L.Trainer, module: Any) -> nn.Module | None:
    """The module's network if its weights are whole; else one that is built again, on the CPU, with
    the trained weights put in.

    All ranks call it; only the first one gets a network where weights are cut. What was not trained
    is read again from where it came from, so one rank's host memory holds one copy of the network
    and no device more than one weight.
    """
    strategy: Any = trainer.strategy
    if not getattr(strategy, "shards_weights", False):
        return module.network
    trained: dict[str, Tensor] = {}
    for name, parameter in module.network.named_parameters():
        if parameter.requires_grad:
            whole = strategy.gather(parameter)
            if trainer.is_global_zero:
                trained[name] = whole.cpu()
    if not trainer.is_global_zero:
        return None
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        network = build_network(module.network_spec, trainer.datamodule.tokenizer)  # type: ignore[attr-defined]
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in trained:
                parameter.copy_(trained.pop(name))
    assert not trained, f"trained weights without a place: {sorted(trained)}"
    return network
