"""Objectives, one per file."""

from lightning_modules.base import ObjectiveModule
from lightning_modules.booster import BoosterModule
from lightning_modules.sft import SFTModule

__all__ = ["BoosterModule", "ObjectiveModule", "SFTModule"]
