"""Kinds of data, one per file."""

from datamodules.base import StreamDataModule
from datamodules.synthetic_alignment import SyntheticAlignment
from datamodules.synthetic_attack import SyntheticAttack
from datamodules.synthetic_instruct import SyntheticInstruct

__all__ = ["StreamDataModule", "SyntheticAlignment", "SyntheticAttack", "SyntheticInstruct"]
