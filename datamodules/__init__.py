"""Kinds of data, one per file."""

from datamodules.base import StreamDataModule
from datamodules.synthetic_alignment import SyntheticAlignment
from datamodules.synthetic_attack import SyntheticAttack
from datamodules.synthetic_derta import SyntheticDeRTa
from datamodules.synthetic_instruct import SyntheticInstruct
from datamodules.synthetic_kto import SyntheticKTO
from datamodules.synthetic_preference import SyntheticPreference
from datamodules.synthetic_unlearning import SyntheticUnlearning

__all__ = [
    "StreamDataModule",
    "SyntheticAlignment",
    "SyntheticAttack",
    "SyntheticDeRTa",
    "SyntheticInstruct",
    "SyntheticKTO",
    "SyntheticPreference",
    "SyntheticUnlearning",
]
