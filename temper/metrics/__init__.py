"""Figures of an evaluation as torchmetrics, with intervals."""

from temper.metrics.agreement import agreements, cohens_kappa
from temper.metrics.safety import (
    AttackSuccessRate,
    DegenerateRate,
    FineTuneAccuracy,
    HarmfulScore,
    JudgedProportion,
    OverRefusalRate,
    Proportion,
    RefusalRate,
    SafeAccuracy,
    SafetyFigures,
    wilson_interval,
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
    "SafetyFigures",
    "agreements",
    "cohens_kappa",
    "wilson_interval",
]
