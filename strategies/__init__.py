"""Where weights and gradients live: one weight space per Lightning strategy."""

from strategies.ddp import whole_network
from strategies.fsdp2 import FSDP2Strategy
from strategies.select import register_strategies, weight_space
from strategies.weight_space import Loss, Vector, WeightSpace
from strategies.zero import ZeROStrategy

register_strategies()

__all__ = [
    "FSDP2Strategy",
    "Loss",
    "Vector",
    "WeightSpace",
    "ZeROStrategy",
    "weight_space",
    "whole_network",
]
