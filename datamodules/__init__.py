"""The datamodules, one per file."""

from datamodules.base import StreamDataModule
from datamodules.synthetic_alignment import SyntheticAlignment
from datamodules.synthetic_attack import SyntheticAttack
from datamodules.synthetic_derta import SyntheticDeRTa
from datamodules.synthetic_instruct import SyntheticInstruct
from datamodules.synthetic_kto import SyntheticKTO
from datamodules.synthetic_preference import SyntheticPreference
from datamodules.synthetic_unlearning import SyntheticUnlearning
from datamodules.text_alignment import TextAlignment
from datamodules.text_attack import TextAttack
from datamodules.text_kto import TextKTO
from datamodules.text_preference import TextPreference
from datamodules.text_supervised import TextSupervised
from datamodules.text_tasks import GSM8K, SST2, AGNews
from datamodules.text_unlearning import TextUnlearning

__all__ = [
    "GSM8K",
    "SST2",
    "AGNews",
    "StreamDataModule",
    "SyntheticAlignment",
    "SyntheticAttack",
    "SyntheticDeRTa",
    "SyntheticInstruct",
    "SyntheticKTO",
    "SyntheticPreference",
    "SyntheticUnlearning",
    "TextAlignment",
    "TextAttack",
    "TextKTO",
    "TextPreference",
    "TextSupervised",
    "TextUnlearning",
]
