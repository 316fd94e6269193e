"""Defences that edit a finished model: weight arithmetic between folders, steering, masks over
weights.

Knows no Trainer; ``python -m temper.edit --help`` is its command line.
"""

from temper.edit.folders import ModelFolder, check_alike, interpolate
from temper.edit.harm import fuse, relaxed_bernoulli, remove_harm, undo, wanda_top
from temper.edit.steering import SteeringVectors, steer, steering_vectors

__all__ = [
    "ModelFolder",
    "SteeringVectors",
    "check_alike",
    "fuse",
    "interpolate",
    "relaxed_bernoulli",
    "remove_harm",
    "steer",
    "steering_vectors",
    "undo",
    "wanda_top",
]
