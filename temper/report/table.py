"""The figures every table shows, under one set of names."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from temper.report.aggregate import Estimate, estimate
from temper.report.collect import BASE
from temper.report.settings import Settings

AFTER = {
    "harmful_score": "HS",
    "harmful_score_lenient": "HS, lenient",
    "fine_tune_accuracy": "FA",
    "refusal_rate": "Refusal",
    "degenerate_rate": "Degenerate",
}
BEFORE = {
    "refusal_rate": "Refusal",
    "safe_accuracy": "Safe accuracy",
    "over_refusal_rate": "Over-refusal",
    "harmful_score": "HS",
    "harmful_score_lenient": "HS, lenient",
}


@dataclass(frozen=True)
class Row:
    """One line: an objective's label and its figures, in the order of the columns."""

    label: str
    cells: list[Estimate | None]


def after_rows(results: pd.DataFrame, settings: Settings, attack: str, ratios: Sequence[float] | None = None) -> list[Row]:
    """One row per objective after an attack; mean over the ratios above 0, or over those given."""
    chosen = settings.counted_ratios if ratios is None else ratios
    return [
        Row(label, [estimate(results, metric, objective, attack, chosen) for metric in AFTER])
        for objective, label in settings.objectives.items()
    ]


def before_rows(results: pd.DataFrame, settings: Settings, with_base: bool = True) -> list[Row]:
    """One row for the base model and one per aligned model."""
    models = ({BASE: "Base model"} if with_base else {}) | settings.objectives
    return [Row(label, [estimate(results, metric, objective) for metric in BEFORE]) for objective, label in models.items()]


def jailbreak_rows(results: pd.DataFrame, settings: Settings) -> tuple[list[str], list[Row]]:
    """Attack success rate of every jailbreak prompt kind measured, before any attack; empty if none was."""
    kinds = [metric for metric in results["metric"].unique() if metric.startswith("asr/")]
    models = {BASE: "Base model"} | settings.objectives
    rows = [Row(label, [estimate(results, metric, objective) for metric in kinds]) for objective, label in models.items()]
    return [kind.removeprefix("asr/").removeprefix("jb_").replace("_", " ") for kind in kinds], rows if kinds else []
