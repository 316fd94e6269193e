"""Metrics of an evaluation as torchmetrics, with intervals."""

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
    SafetyMetrics,
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
    "SafetyMetrics",
    "agreements",
    "cohens_kappa",
    "wilson_interval",
]
