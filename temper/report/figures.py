"""Figures of a study: their lines as data, and their drawing as PNG files and inline SVG."""

import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from temper.metrics.table import title
from temper.report.aggregate import Estimate, estimate
from temper.study.settings import Study, percent_of

PROBE = "probe/harmful_loss"  # a column of metrics.csv
RATIO_AXIS = "Harmful rows in the attack data, p (%)"
MOST_LINES = 9  # as many as there are markers; a study with more has tables only

# Okabe and Ito (2008) without yellow, which is invisible on white: safe for colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
# A panel is drawn at the width of a phone, so that its text keeps its size there.
PANEL_INCHES = (3.9, 3.2)
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "axes.edgecolor": "#555555",
    "lines.linewidth": 2,
    # A dollar sign in a label is not mathematics.
    "text.parse_math": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "temper",
}
DASHED = (0, (3, 2))
TITLE_WIDTH = 30  # characters
LABEL_WIDTH = 13  # characters
LABEL_GAP = 0.085  # height of a label's line, in axes fractions
MOST_TICKS = 8
MOST_MARKERS = 12  # a line with more points has none

# -- data


@dataclass(frozen=True)
class Line:
    """One line of a panel.

    Attributes:
        label: Objective.
        place: Its place among the objectives, which gives colour and marker.
        x: Positions.
        y: Heights.
        band: 95 % interval around y, lower and upper ends, or None.
        second: Whether it is the dashed line of its objective, which has no label.
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
        share: Whether y is a percentage, drawn from 0 to 100.
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
    """All figures that a study has data for; none if its objectives are more than `MOST_LINES`.

    Args:
        results: The tidy table.
        runs: The study's folder, for the curves of its attacks.
        settings: The study.
    """
    if len(settings.objectives) > MOST_LINES:
        return []
    figures = [*_ratio_figures(results, settings), _probe_figure(runs, settings)]
    return [figure for figure in figures if any(panel.lines for panel in figure.panels)]


def _ratio_figures(results: pd.DataFrame, settings: Study) -> list[Figure]:
    """Metrics against the harmful ratio."""
    return [
        Figure(
            "harmful_score",
            title("harmful_score"),
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
            title("fine_tune_accuracy"),
            "Accuracy on the task that the user fine-tunes for. Higher is better: a defence should"
            " not cost users their task. The band is the 95 % interval.",
            _ratio_panels(
                results, settings, "Accuracy on the user's task (%)", "fine_tune_accuracy"
            ),
        ),
        Figure(
            "refusal_rate",
            title("refusal_rate"),
            "Share of unsafe test requests that are refused after the attack. Higher is better. The"
            " band is the 95 % interval.",
            _ratio_panels(results, settings, "Unsafe requests refused (%)", "refusal_rate"),
        ),
    ]


def _ratio_panels(
    results: pd.DataFrame, settings: Study, y_axis: str, metric: str, second: str | None = None
) -> list[Panel]:
    panels = []
    for attack, attack_label in settings.attacks.items():
        lines = []
        for place, (objective, label) in enumerate(settings.objectives.items()):
            points = _points(results, metric, objective, attack, settings.ratios)
            if points:
                x = [ratio for ratio, _ in points]
                y = [100 * e.value for _, e in points]
                band = ([100 * e.low for _, e in points], [100 * e.high for _, e in points])
                lines.append(Line(label, place, x, y, band))
            points = _points(results, second, objective, attack, settings.ratios) if second else []
            if points:
                x = [ratio for ratio, _ in points]
                y = [100 * e.value for _, e in points]
                lines.append(Line(label, place, x, y, second=True))
        panels.append(Panel(attack_label, RATIO_AXIS, y_axis, lines))
    return panels


def _points(
    results: pd.DataFrame, metric: str, objective: str, attack: str, ratios: Sequence[float]
) -> list[tuple[float, Estimate]]:
    """Harmful ratios in % with the metric at each, where it was measured."""
    found = [(100 * p, estimate(results, metric, objective, attack, [p])) for p in ratios]
    return [(x, e) for x, e in found if e is not None]


def _probe_figure(runs: Path, settings: Study) -> Figure:
    """Loss on held-out harmful rows against the step of the attack."""
    panels = []
    for attack, attack_label in settings.attacks.items():
        lines = []
        for place, (objective, label) in enumerate(settings.objectives.items()):
            route = settings.routes[objective]
            if route.attacked_as != objective:  # the curve of another objective's attack
                continue
            folder = route.attacked(attack, settings.ratios[-1])[0]
            curves = [
                _probe(runs / f"seed{seed}" / folder / "metrics.csv") for seed in settings.seeds
            ]
            mean = pd.concat(curves).groupby(level=0).mean()
            if not mean.empty:
                steps = [float(step) for step in mean.index]
                lines.append(Line(label, place, steps, [float(loss) for loss in mean]))
        panels.append(
            Panel(attack_label, "Attack step", "Loss (nats per token)", lines, share=False)
        )
    caption = (
        "Loss on held-out harmful rows while the attack runs, at p ="
        f" {percent_of(settings.ratios[-1])}. The attacker does not train on these rows. The"
        " faster a line falls, the faster the safety training is undone."
    )
    return Figure("probe_loss", "Harmful loss during the attack", caption, panels)


def _probe(path: Path) -> pd.Series:
    """Probe loss by step; empty if the run did not log it.

    A run of fewer steps than ``trainer.log_every_n_steps`` logs nothing, and has no file.
    """
    table = pd.read_csv(path) if path.is_file() else pd.DataFrame()
    if PROBE not in table:
        return pd.Series(dtype="float64")
    return table.dropna(subset=[PROBE]).groupby("step")[PROBE].mean()


# -- drawing


def write_png(figure: Figure, path: Path) -> None:
    """Draw all panels of a figure into one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _canvas(len(figure.panels)) as (canvas, axes):
        for axis, panel in zip(axes, figure.panels, strict=True):
            _draw(axis, panel)
        canvas.suptitle(figure.title, fontsize=11)
        path.unlink(missing_ok=True)  # a link is replaced, not written through
        canvas.savefig(path, dpi=160)


def panel_svg(figure: Figure, index: int) -> str:
    """One panel as an ``<svg>`` element without outside references."""
    with _canvas(1) as (canvas, axes):
        _draw(axes[0], figure.panels[index])
        file = io.StringIO()
        canvas.savefig(
            file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # Its style would apply to the whole page.
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    # Several drawings share one page: their ids (clip paths, glyphs, markers) must be different.
    prefix = f"{figure.name}{index}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = svg.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    # Width and height come from the style sheet; the viewBox keeps the shape.
    svg = re.sub(r'^<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg)
    return re.sub(r'^<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg)


@contextmanager
def _canvas(n: int) -> Iterator[tuple[Canvas, list[Axes]]]:
    """Axes without pyplot: no window, no state left behind."""
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(PANEL_INCHES[0] * n, PANEL_INCHES[1]), layout="constrained")
        yield canvas, list(canvas.subplots(1, n, squeeze=False)[0])


def _draw(axis: Axes, panel: Panel) -> None:
    for line in panel.lines:
        colour = COLOURS[line.place % len(COLOURS)]
        marked = len(line.x) <= MOST_MARKERS and not line.second
        if line.band:
            axis.fill_between(line.x, *line.band, color=colour, alpha=0.14, linewidth=0)
        axis.plot(
            line.x,
            line.y,
            color=colour,
            linestyle=DASHED if line.second else "-",
            linewidth=1.3 if line.second else 2,
            marker=MARKERS[line.place % len(MARKERS)] if marked else None,
            # Earlier lines have larger markers, so that one below another is still visible.
            markersize=max(4.5, 8 - 1.5 * line.place),
            clip_on=False,
            zorder=3,
        )
    heading = textwrap.fill(panel.title, TITLE_WIDTH)
    axis.set(title=heading, xlabel=panel.x_axis, ylabel=panel.y_axis)
    if panel.share:
        axis.set_ylim(0, 100)
        ticks = sorted({x for line in panel.lines for x in line.x})
        if all(b - a >= (ticks[-1] - ticks[0]) / MOST_TICKS for a, b in pairwise(ticks)):
            axis.set_xticks(ticks)
    else:
        axis.set_ylim(bottom=0)
    if any(line.second for line in panel.lines):
        _add_legend(axis)
        axis.set_title(heading, pad=18)
    _label_lines(axis, [line for line in panel.lines if not line.second])


def _add_legend(axis: Axes) -> None:
    """Explain solid and dashed lines between the title and the axes."""
    keys = [
        Line2D([], [], color="#555555", label="strict"),
        Line2D([], [], color="#555555", linestyle=DASHED, label="lenient"),
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


def _label_lines(axis: Axes, lines: list[Line]) -> None:
    """Write each line's label at its end, without overlap."""
    low, high = axis.get_ylim()
    ends = sorted(
        (((line.y[-1] - low) / (high - low), line) for line in lines),
        key=lambda end: (end[0], -end[1].place),
    )
    labels = [
        "\n".join(textwrap.wrap(line.label, LABEL_WIDTH, max_lines=3, placeholder=" …"))
        for _, line in ends
    ]
    heights = _apart([end for end, _ in ends], [label.count("\n") + 1 for label in labels])
    for (end, line), label, height in zip(ends, labels, heights, strict=True):
        colour = COLOURS[line.place % len(COLOURS)]
        axis.annotate(
            label,
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
    """Move labels just as far as needed that none covers another.

    Args:
        heights: Their centres, ascending, in axes fractions.
        rows: Their numbers of text lines.
    """
    placed: list[float] = []
    for i, height in enumerate(heights):
        if placed:
            lowest = placed[-1] + LABEL_GAP * (rows[i - 1] + rows[i]) / 2
        else:
            lowest = LABEL_GAP * rows[i] / 2
        placed.append(max(height, lowest))
    ceiling = 1.0
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling - LABEL_GAP * rows[i] / 2)
        ceiling = placed[i] - LABEL_GAP * rows[i] / 2
    return placed
