"""Defences that edit a trained model: weight arithmetic between model folders, masks over weights,
steering of activations.
"""

from temper.edit.folders import ModelFolder, check_same_network, interpolate
from temper.edit.harm import fuse, relaxed_bernoulli, remove_harm, undo, wanda_top
from temper.edit.steering import SteeringVectors, steer, steering_vectors

__all__ = [
    "ModelFolder",
    "SteeringVectors",
    "check_same_network",
    "fuse",
    "interpolate",
    "relaxed_bernoulli",
    "remove_harm",
    "steer",
    "steering_vectors",
    "undo",
    "wanda_top",
]
