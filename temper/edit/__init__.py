"""Defences that edit a finished model: weight arithmetic between folders, steering, masks over weights.

Knows no Trainer; ``python -m temper.edit --help`` is its command line.
"""

from temper.edit.folders import ModelFolder, check_alike
from temper.edit.harm import remove_harm, undo
from temper.edit.line import interpolate
from temper.edit.masks import fuse, relaxed_bernoulli, wanda_top
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
