"""The lines of every figure, before anything is drawn."""

import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from temper.errors import TemperError
from temper.report.aggregate import Estimate, estimate
from temper.study.settings import Study, percent_of


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


def study_figures(results: pd.DataFrame, runs: Path, settings: Study) -> list[Figure]:
    """All figures a study has data for; none if it has more objectives than lines can be told
    apart.

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
            "Share of unsafe test requests that the attacked model carries out, against the share"
            " of harmful rows in the attacker's data. Lower is better. Solid: carried out in full"
            " (strict). Dashed: in full or in part (lenient). The band is the strict score's 95 %"
            " interval.",
            _ratio_panels(
                results,
                settings,
                "Unsafe requests carried out (%)",
                "harmful_score",
                "harmful_score_lenient",
            ),
        ),
        Figure(
            "fine_tune_accuracy",
            "Fine-tune accuracy (FA)",
            "Accuracy on the task that the user fine-tunes for. Higher is better: a defence should"
            f" not cost the user their task. {band}",
            _ratio_panels(
                results, settings, "Accuracy on the user's task (%)", "fine_tune_accuracy"
            ),
        ),
        Figure(
            "refusal_rate",
            "Refusal rate",
            "Share of unsafe test requests that are refused after the attack. Higher is better."
            f" {band}",
            _ratio_panels(results, settings, "Unsafe requests refused (%)", "refusal_rate"),
        ),
    ]
    figures = [figure for figure in by_ratio if any(panel.lines for panel in figure.panels)]
    probe = _probe_panels(runs, settings)
    if any(panel.lines for panel in probe):
        caption = (
            "Loss on held-out harmful rows while the attack runs, at p ="
            f" {percent_of(settings.ratios[-1])}. The attacker does not train on these rows. The"
            " faster a line falls, the faster the safety training comes undone."
        )
        figures.append(Figure("probe_loss", "Harmful loss during the attack", caption, probe))
    return figures


def _ratio_panels(
    results: pd.DataFrame, settings: Study, y_axis: str, metric: str, second: str | None = None
) -> list[Panel]:
    panels = []
    for attack, title in settings.attacks.items():
        lines = []
        for place, (objective, label) in enumerate(settings.objectives.items()):
            points = _points(results, metric, objective, attack, settings.ratios)
            if points:
                band = ([100 * e.low for _, e in points], [100 * e.high for _, e in points])
                lines.append(
                    Line(
                        label,
                        place,
                        [x for x, _ in points],
                        [100 * e.value for _, e in points],
                        band,
                    )
                )
            points = _points(results, second, objective, attack, settings.ratios) if second else []
            if points:
                lines.append(
                    Line(
                        label,
                        place,
                        [x for x, _ in points],
                        [100 * e.value for _, e in points],
                        second=True,
                    )
                )
        panels.append(Panel(title, RATIO_AXIS, y_axis, lines))
    return panels


def _points(
    results: pd.DataFrame, metric: str, objective: str, attack: str, ratios: Sequence[float]
) -> list[tuple[float, Estimate]]:
    found = [(100 * p, estimate(results, metric, objective, attack, [p])) for p in ratios]
    return [(x, e) for x, e in found if e is not None]


def _probe_panels(runs: Path, settings: Study) -> list[Panel]:
    panels = []
    for attack, title in settings.attacks.items():
        lines = []
        for place, (objective, label) in enumerate(settings.objectives.items()):
            route = settings.routes[objective]
            if route.attacked_as != objective:  # the curve of another objective's attack
                continue
            place_of = route.attacked(attack, settings.ratios[-1])[0]
            curves = [
                _probe(runs / f"seed{seed}" / place_of / "metrics.csv") for seed in settings.seeds
            ]
            mean = pd.concat(curves).groupby(level=0).mean()
            if not mean.empty:
                lines.append(
                    Line(
                        label, place, [float(step) for step in mean.index], [float(v) for v in mean]
                    )
                )
        panels.append(Panel(title, "Attack step", "Loss (nats per token)", lines, share=False))
    return panels


def _probe(path: Path) -> pd.Series:
    """Probe loss by step; empty if the run did not follow it."""
    if not path.is_file():
        raise TemperError(
            f"{path}: missing; it is the stage's CSVLogger output, delete the stage's folder and"
            " run the study again"
        )
    table = pd.read_csv(path)
    if PROBE not in table:
        return pd.Series(dtype="float64")
    return table.dropna(subset=[PROBE]).groupby("step")[PROBE].mean()


# MERGED from temper.report.figures: Figures as PNG files and as inline SVG.


# Okabe and Ito (2008) without yellow, which is lost on white: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
# A panel is drawn at the width of a phone, so that its letters keep their size there.
PANEL_INCHES = (3.9, 3.2)
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "axes.edgecolor": "#555555",
    "lines.linewidth": 2,
    # A label is text, also with dollar signs in it.
    "text.parse_math": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "temper",
}
LABEL_LETTERS = 13
LABEL_GAP = 0.085
MOST_TICKS = 8
TITLE_LETTERS = 30


def write_png(figure: Figure, path: Path) -> None:
    """Draw all panels of a figure into one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _canvas(len(figure.panels)) as (canvas, axes):
        for axis, panel in zip(axes, figure.panels, strict=True):
            _draw(axis, panel)
        canvas.suptitle(figure.title, fontsize=11)
        canvas.savefig(path, dpi=160)


def panel_svg(figure: Figure, index: int) -> str:
    """One panel as an ``<svg>`` element that needs nothing from outside."""
    with _canvas(1) as (canvas, axes):
        _draw(axes[0], figure.panels[index])
        file = io.StringIO()
        canvas.savefig(
            file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # Its style would hold for the whole page.
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    # Several drawings share one page: their ids (clip paths, letters, markers) must not meet.
    prefix = f"{figure.name}{index}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = svg.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    # Width and height come from the style sheet; the viewBox keeps the shape.
    return re.sub(
        r'^<svg ([^>]*?)width="[^"]*"',
        r"<svg \1",
        re.sub(r'^<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg),
    )


@contextmanager
def _canvas(n: int) -> Iterator[tuple[Canvas, list[Axes]]]:
    """Axes without pyplot: no window, no state left behind."""
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        canvas = Canvas(figsize=(PANEL_INCHES[0] * n, PANEL_INCHES[1]), layout="constrained")
        yield canvas, list(canvas.subplots(1, n, squeeze=False)[0])


def _draw(axis: Axes, panel: Panel) -> None:
    for line in panel.lines:
        colour, marker = COLOURS[line.place % len(COLOURS)], MARKERS[line.place % len(MARKERS)]
        few = len(line.x) <= FEW_POINTS
        if line.band:
            axis.fill_between(line.x, *line.band, color=colour, alpha=0.14, linewidth=0)
        axis.plot(
            line.x,
            line.y,
            color=colour,
            linestyle=(0, (3, 2)) if line.second else "-",
            linewidth=1.3 if line.second else 2,
            marker=marker if few and not line.second else None,
            # Earlier lines wear larger markers, so that one on top of another is still seen.
            markersize=max(4.5, 8 - 1.5 * line.place),
            clip_on=False,
            zorder=3,
        )
    title = textwrap.fill(panel.title, TITLE_LETTERS)
    axis.set(title=title, xlabel=panel.x_axis, ylabel=panel.y_axis)
    if panel.share:
        axis.set_ylim(0, 100)
        ticks = sorted({x for line in panel.lines for x in line.x})
        if all(b - a >= (ticks[-1] - ticks[0]) / MOST_TICKS for a, b in pairwise(ticks)):
            axis.set_xticks(ticks)
    else:
        axis.set_ylim(bottom=0)
    if any(line.second for line in panel.lines):
        keys = [
            Line2D([], [], color="#555555", label="strict"),
            Line2D([], [], color="#555555", linestyle=(0, (3, 2)), label="lenient"),
        ]
        axis.legend(
            handles=keys,
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=2,
            frameon=False,
            fontsize=8,
            borderpad=0,
            borderaxespad=0.2,
        )
        axis.set_title(title, pad=18)
    _name_lines(axis, [line for line in panel.lines if not line.second])


def _name_lines(axis: Axes, lines: list[Line]) -> None:
    """Write each line's name at its end, apart from one another."""
    low, high = axis.get_ylim()
    ends = sorted(
        (((line.y[-1] - low) / (high - low), line) for line in lines),
        key=lambda end: (end[0], -end[1].place),
    )
    names = [
        "\n".join(textwrap.wrap(line.label, LABEL_LETTERS, max_lines=3, placeholder=" …"))
        for _, line in ends
    ]
    heights = _apart([end for end, _ in ends], [name.count("\n") + 1 for name in names])
    for (end, line), name, height in zip(ends, names, heights, strict=True):
        colour = COLOURS[line.place % len(COLOURS)]
        axis.annotate(
            name,
            xy=(line.x[-1], low + end * (high - low)),
            xytext=(1.06, height),
            textcoords="axes fraction",
            color=colour,
            fontsize=9,
            fontweight="bold",
            va="center",
            linespacing=1.0,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.8,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def _apart(heights: list[float], rows: list[int]) -> list[float]:
    """Move names (heights rising, in axes fractions) just so far that none covers another."""
    placed: list[float] = []
    for i, height in enumerate(heights):
        floor = (
            placed[-1] + LABEL_GAP * (rows[i - 1] + rows[i]) / 2
            if placed
            else LABEL_GAP * rows[i] / 2
        )
        placed.append(max(height, floor))
    ceiling = 1.0
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling - LABEL_GAP * rows[i] / 2)
        ceiling = placed[i] - LABEL_GAP * rows[i] / 2
    return placed


PROBE = "probe/harmful_loss"
RATIO_AXIS = "Harmful rows in the attack data, p (%)"
MOST_LINES = 9  # as many as there are markers: the tables are for the rest
FEW_POINTS = 12
