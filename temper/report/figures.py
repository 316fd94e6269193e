"""The lines of every figure, before anything is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from temper.errors import TemperError
from temper.report.aggregate import Estimate, estimate
from temper.report.settings import Settings, percent_of

PROBE = "probe/harmful_loss"
RATIO_AXIS = "Harmful rows in the attack data, p (%)"
MOST_LINES = 9  # as many as there are markers: the tables are for the rest
FEW_POINTS = 12


@dataclass(frozen=True)
class Line:
    """One line of a panel.

    Attributes:
        label: Objective.
        place: Its place among the objectives; colour and marker follow from it.
        x: Positions.
        y: Heights.
        band: 95 % interval around y, or None.
        second: Whether it is the dashed line of its objective, which bears no name.
    """

    label: str
    place: int
    x: list[float]
    y: list[float]
    band: tuple[list[float], list[float]] | None = None
    second: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: Label of the attack.
        x_axis: Quantity and unit.
        y_axis: Quantity and unit.
        lines: Its lines.
        share: Whether y is a percentage, shown from 0 to 100.
    """

    title: str
    x_axis: str
    y_axis: str
    lines: list[Line]
    share: bool = True


@dataclass(frozen=True)
class Figure:
    """Panels side by side, one per attack.

    Attributes:
        name: File name without ending.
        title: Heading.
        caption: How to read it.
        panels: One per attack.
    """

    name: str
    title: str
    caption: str
    panels: list[Panel]


def study_figures(results: pd.DataFrame, runs: Path, settings: Settings) -> list[Figure]:
    """All figures a study has data for; none if it has more objectives than lines can be told apart.

    Raises:
        TemperError: An attacked stage has no ``metrics.csv``.
    """
    if len(settings.objectives) > MOST_LINES:
        return []
    band = "The band is the 95 % interval."
    by_ratio = [
        Figure(
            "harmful_score",
            "Harmful score (HS)",
            "Share of unsafe test requests that the attacked model carries out, against the share of harmful rows in the attacker's data. "
            "Lower is better. Solid: carried out in full (strict). Dashed: in full or in part (lenient). "
            "The band is the strict score's 95 % interval.",
            _ratio_panels(results, settings, "Unsafe requests carried out (%)", "harmful_score", "harmful_score_lenient"),
        ),
        Figure(
            "fine_tune_accuracy",
            "Fine-tune accuracy (FA)",
            f"Accuracy on the task that the user fine-tunes for. Higher is better: a defence should not cost the user their task. {band}",
            _ratio_panels(results, settings, "Accuracy on the user's task (%)", "fine_tune_accuracy"),
        ),
        Figure(
            "refusal_rate",
            "Refusal rate",
            f"Share of unsafe test requests that are refused after the attack. Higher is better. {band}",
            _ratio_panels(results, settings, "Unsafe requests refused (%)", "refusal_rate"),
        ),
    ]
    figures = [figure for figure in by_ratio if any(panel.lines for panel in figure.panels)]
    probe = _probe_panels(runs, settings)
    if any(panel.lines for panel in probe):
        caption = (
            f"Loss on held-out harmful rows while the attack runs, at p = {percent_of(settings.ratios[-1])}. The attacker does not "
            "train on these rows. The faster a line falls, the faster the safety training comes undone."
        )
        figures.append(Figure("probe_loss", "Harmful loss during the attack", caption, probe))
    return figures


def _ratio_panels(results: pd.DataFrame, settings: Settings, y_axis: str, metric: str, second: str | None = None) -> list[Panel]:
    panels = []
    for attack, title in settings.attacks.items():
        lines = []
        for place, (objective, label) in enumerate(settings.objectives.items()):
            points = _points(results, metric, objective, attack, settings.ratios)
            if points:
                band = ([100 * e.low for _, e in points], [100 * e.high for _, e in points])
                lines.append(Line(label, place, [x for x, _ in points], [100 * e.value for _, e in points], band))
            points = _points(results, second, objective, attack, settings.ratios) if second else []
            if points:
                lines.append(Line(label, place, [x for x, _ in points], [100 * e.value for _, e in points], second=True))
        panels.append(Panel(title, RATIO_AXIS, y_axis, lines))
    return panels


def _points(results: pd.DataFrame, metric: str, objective: str, attack: str, ratios: Sequence[float]) -> list[tuple[float, Estimate]]:
    found = [(100 * p, estimate(results, metric, objective, attack, [p])) for p in ratios]
    return [(x, e) for x, e in found if e is not None]


def _probe_panels(runs: Path, settings: Settings) -> list[Panel]:
    panels = []
    for attack, title in settings.attacks.items():
        lines = []
        for place, (objective, label) in enumerate(settings.objectives.items()):
            route = settings.routes[objective]
            if route.attacked_as != objective:  # the curve of another objective's attack
                continue
            place_of = route.attacked(attack, settings.ratios[-1])[0]
            curves = [_probe(runs / f"seed{seed}" / place_of / "metrics.csv") for seed in settings.seeds]
            mean = pd.concat(curves).groupby(level=0).mean()
            if not mean.empty:
                lines.append(Line(label, place, [float(step) for step in mean.index], [float(v) for v in mean]))
        panels.append(Panel(title, "Attack step", "Loss (nats per token)", lines, share=False))
    return panels


def _probe(path: Path) -> pd.Series:
    """Probe loss by step; empty if the run did not follow it."""
    if not path.is_file():
        raise TemperError(f"{path}: missing; it is the stage's CSVLogger output, delete the stage's folder and run the study again")
    table = pd.read_csv(path)
    if PROBE not in table:
        return pd.Series(dtype="float64")
    return table.dropna(subset=[PROBE]).groupby("step")[PROBE].mean()
