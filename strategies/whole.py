"""A whole network out of one whose weights are cut over ranks."""

from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from temper.models import build_network


def whole_network(trainer: L.Trainer, module: Any) -> nn.Module | None:
    """The module's network if its weights are whole; else one that is built again, on the CPU, with the trained weights put in.

    All ranks call it; only the first one gets a network where weights are cut. What was not trained is read again from where it
    came from, so one rank's host memory holds one copy of the network and no device more than one weight.
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
