"""Where weights and gradients live: one weight space per Lightning strategy."""

from strategies.select import weight_space
from strategies.vector import Vector
from strategies.weight_space import WeightSpace

__all__ = ["Vector", "WeightSpace", "weight_space"]
