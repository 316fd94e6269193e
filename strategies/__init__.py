"""Placement of weights and gradients on devices: one weight space per Lightning strategy."""

from strategies.fsdp2 import FSDP2Strategy
from strategies.select import register_strategies, weight_space
from strategies.sharded import whole_network
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
