"""The figures every table shows, before and after the attack, under one set of names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from temper.report.aggregate import Estimate, estimate
from temper.report.collect import BASE
from temper.report.settings import Settings, percent_of

FIGURES = {
    "harmful_score": "HS",
    "harmful_score_lenient": "HS, lenient",
    "fine_tune_accuracy": "FA",
    "refusal_rate": "Refusal",
    "over_refusal_rate": "Over-refusal",
    "safe_accuracy": "Safe accuracy",
    "degenerate_rate": "Degenerate",
}
# What they are, in words that are true of every judge: not all have a middle label, or know a right answer when they see one.
MEANINGS = {
    "harmful_score": "harmful score, unsafe requests carried out in full",
    "harmful_score_lenient": "in full or in part",
    "fine_tune_accuracy": "fine-tune accuracy, on the user's own task",
    "refusal_rate": "unsafe requests refused",
    "over_refusal_rate": "safe requests refused",
    "safe_accuracy": "safe requests answered, and right where the judge can tell",
    "degenerate_rate": "neither a refusal nor well-formed",
}
BASE_LABEL = "Base model"


@dataclass(frozen=True)
class Row:
    """One line: a model's label and its figures, in the order of the columns."""

    label: str
    cells: list[Estimate | None]


@dataclass(frozen=True)
class Group:
    """The lines of one moment: before the attack, or after one."""

    title: str
    rows: list[Row]


@dataclass(frozen=True)
class FigureTable:
    """Groups with the same columns.

    Attributes:
        metrics: Keys of `FIGURES`, one per column.
        groups: Lines of as many cells.
    """

    metrics: list[str]
    groups: list[Group]

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return [FIGURES[metric] for metric in self.metrics]

    def legend(self, names: Mapping[str, str] = FIGURES) -> list[tuple[str, str]]:
        """What the columns are: the name that a table has for each, and its meaning."""
        return [(names[metric], MEANINGS[metric]) for metric in self.metrics]


def before_table(results: pd.DataFrame, settings: Settings) -> FigureTable:
    """The base model and every aligned model, before any attack."""
    return _measured([_before(results, settings)])


def after_table(results: pd.DataFrame, settings: Settings, every_ratio: bool = False) -> FigureTable:
    """Every objective after every attack.

    Args:
        results: The tidy table.
        settings: The study.
        every_ratio: One group per harmful ratio; otherwise the mean over those above 0.
    """
    return _measured(_after(results, settings, every_ratio))


def whole_table(results: pd.DataFrame, settings: Settings) -> FigureTable:
    """Both: before any attack, then after each."""
    after = [Group(f"After: {group.title}", group.rows) for group in _after(results, settings)]
    return _measured([_before(results, settings), *after])


def jailbreak_rows(results: pd.DataFrame, settings: Settings) -> tuple[list[str], list[Row]]:
    """Attack success rate of every jailbreak prompt kind measured, before any attack; empty if none was."""
    kinds = [metric for metric in results["metric"].unique() if metric.startswith("asr/")]
    models = {BASE: BASE_LABEL} | settings.objectives
    rows = [Row(label, [estimate(results, metric, objective) for metric in kinds]) for objective, label in models.items()]
    return [kind.removeprefix("asr/").removeprefix("jb_").replace("_", " ") for kind in kinds], rows if kinds else []


def _before(results: pd.DataFrame, settings: Settings) -> Group:
    return Group("Before the attack", _rows(results, {BASE: BASE_LABEL} | settings.objectives))


def _after(results: pd.DataFrame, settings: Settings, every_ratio: bool = False) -> list[Group]:
    if every_ratio:
        places = [(attack, f"{title}, p = {percent_of(p)}", [p]) for attack, title in settings.attacks.items() for p in settings.ratios]
    else:
        places = [(attack, title, list(settings.counted_ratios)) for attack, title in settings.attacks.items()]
    return [Group(title, _rows(results, settings.objectives, attack, ratios)) for attack, title, ratios in places]


def _rows(results: pd.DataFrame, models: Mapping[str, str], attack: str | None = None, ratios: Sequence[float] | None = None) -> list[Row]:
    """One row per model, given by key and label, with all figures."""
    return [Row(label, [estimate(results, metric, key, attack, ratios) for metric in FIGURES]) for key, label in models.items()]


def _measured(groups: list[Group]) -> FigureTable:
    """Groups as a table, without the columns that nothing in it was measured for."""
    kept = [i for i in range(len(FIGURES)) if any(row.cells[i] is not None for group in groups for row in group.rows)]
    rows = [Group(group.title, [Row(row.label, [row.cells[i] for i in kept]) for row in group.rows]) for group in groups]
    return FigureTable([list(FIGURES)[i] for i in kept], rows)
