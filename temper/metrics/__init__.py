"""Figures of an evaluation as torchmetrics, with intervals."""

from temper.metrics.proportion import Proportion, wilson_interval
from temper.metrics.safety import (
    AttackSuccessRate,
    DegenerateRate,
    FineTuneAccuracy,
    HarmfulScore,
    JudgedProportion,
    OverRefusalRate,
    RefusalRate,
    SafeAccuracy,
)

__all__ = [
    "AttackSuccessRate",
    "DegenerateRate",
    "FineTuneAccuracy",
    "HarmfulScore",
    "JudgedProportion",
    "OverRefusalRate",
    "Proportion",
    "RefusalRate",
    "SafeAccuracy",
    "wilson_interval",
]
