"""Tables of a study's metrics before and after the attack: as data, in LaTeX and in a terminal.

Every metric and its names are those of `temper.metrics.table`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from temper.metrics.table import ASR, BY_COLUMN, SafetyMetricEntry, jailbreak_name
from temper.report.aggregate import Estimate, estimate, percent
from temper.report.collect import BASE
from temper.study.settings import Study, percent_of

BASE_LABEL = "Base model"
LABEL_WIDTH = 28  # characters of a model's label in a terminal
LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "[": "{[}",  # bare, it would be an option of the line break before it
    "|": r"\textbar{}",
} | {letter: f"\\{letter}" for letter in "&%$#_{}"}

# -- as data


@dataclass(frozen=True)
class Row:
    """A model's label and its metrics in the order of the columns; None: not measured."""

    label: str
    cells: list[Estimate | None]


@dataclass(frozen=True)
class Group:
    """Rows of one moment: before the attack, or after one attack."""

    title: str
    rows: list[Row]


@dataclass(frozen=True)
class MetricTable:
    """Groups of rows with the same columns.

    Attributes:
        metrics: One per column.
        groups: Their rows have as many cells.
    """

    metrics: list[SafetyMetricEntry]
    groups: list[Group]


def before_table(results: pd.DataFrame, settings: Study) -> MetricTable:
    """The base model and every aligned model, before any attack."""
    return _measured([_before(results, settings)])


def after_table(results: pd.DataFrame, settings: Study, every_ratio: bool = False) -> MetricTable:
    """Every objective after every attack.

    Args:
        results: The tidy table.
        settings: The study.
        every_ratio: Whether each harmful ratio has a group; otherwise the cells are means over the
            ratios above 0.
    """
    return _measured(_after(results, settings, every_ratio))


def whole_table(results: pd.DataFrame, settings: Study) -> MetricTable:
    """All models before the attack, then after each attack."""
    after = [Group(f"After: {group.title}", group.rows) for group in _after(results, settings)]
    return _measured([_before(results, settings), *after])


def jailbreak_rows(results: pd.DataFrame, settings: Study) -> tuple[list[str], list[Row]]:
    """Attack success rates of jailbreak prompts before any attack: names of the jailbreaks, and a
    row per model; no rows if none was measured.
    """
    keys = [key for key in results["metric"].unique() if key.startswith(ASR)]
    names = [jailbreak_name(key) for key in keys]
    if not keys:
        return names, []
    rows = [
        Row(label, [estimate(results, key, objective) for key in keys])
        for objective, label in _models(settings).items()
    ]
    return names, rows


def _models(settings: Study) -> dict[str, str]:
    """Keys and labels of the models before any attack."""
    return {BASE: BASE_LABEL} | settings.objectives


def _before(results: pd.DataFrame, settings: Study) -> Group:
    return Group("Before the attack", _rows(results, _models(settings)))


def _after(results: pd.DataFrame, settings: Study, every_ratio: bool = False) -> list[Group]:
    groups = []
    for attack, title in settings.attacks.items():
        if not every_ratio:
            rows = _rows(results, settings.objectives, attack, settings.counted_ratios)
            groups.append(Group(title, rows))
            continue
        for p in settings.ratios:
            rows = _rows(results, settings.objectives, attack, [p])
            groups.append(Group(f"{title}, p = {percent_of(p)}", rows))
    return groups


def _rows(
    results: pd.DataFrame,
    models: Mapping[str, str],
    attack: str | None = None,
    ratios: Sequence[float] | None = None,
) -> list[Row]:
    """A row with all metrics for every model, given by key and label."""
    return [
        Row(label, [estimate(results, entry.key, model, attack, ratios) for entry in BY_COLUMN])
        for model, label in models.items()
    ]


def _measured(groups: list[Group]) -> MetricTable:
    """A table of the groups, without the columns that have no value."""
    kept = [
        i
        for i in range(len(BY_COLUMN))
        if any(row.cells[i] is not None for group in groups for row in group.rows)
    ]
    narrowed = [
        Group(group.title, [Row(row.label, [row.cells[i] for i in kept]) for row in group.rows])
        for group in groups
    ]
    return MetricTable([BY_COLUMN[i] for i in kept], narrowed)


# -- in LaTeX


def latex_table(results: pd.DataFrame, settings: Study) -> str:
    """A booktabs table of every model before the attack and after each, in %, means over seeds.

    Args:
        results: The tidy table (``results.csv``).
        settings: The study.
    """
    table = whole_table(results, settings)
    headings = ["Model", *(entry.latex for entry in table.metrics)]
    legend = "; ".join(f"{entry.latex}: {latex_text(entry.meaning)}" for entry in table.metrics)
    seeds = "one seed" if len(settings.seeds) == 1 else f"mean over {len(settings.seeds)} seeds"
    title = settings.title if settings.title.endswith((".", "?", "!")) else f"{settings.title}."
    lines = [
        "% Needs \\usepackage{booktabs}.",
        r"\begin{table}",
        r"  \centering\small\setlength{\tabcolsep}{4pt}",
        (
            f"  \\caption{{{latex_text(title)} All in \\%, {seeds}; after an attack,"
            f" {latex_text(settings.ratio_words)}. {legend}.}}"
        ),
        rf"  \begin{{tabular}}{{l{'r' * len(table.metrics)}}}",
        r"    \toprule",
        f"    {' & '.join(headings)} \\\\",
    ]
    for group in table.groups:
        title_cell = rf"\multicolumn{{{len(headings)}}}{{l}}{{\emph{{{latex_text(group.title)}}}}}"
        lines += [r"    \midrule", rf"    {title_cell} \\"]
        for row in group.rows:
            cells = [latex_text(row.label), *(_cell(cell, "--") for cell in row.cells)]
            lines.append(f"    {' & '.join(cells)} \\\\")
    lines += [r"    \bottomrule", r"  \end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def latex_text(text: str) -> str:
    """Text on one line with LaTeX's special characters escaped."""
    return "".join(LATEX_ESCAPES.get(letter, letter) for letter in " ".join(text.split()))


# -- in a terminal


def result_table(results: pd.DataFrame, settings: Study) -> Table:
    """A table of every model before the attack and after each, in %; at most 90 columns wide.

    Args:
        results: The tidy table (``results.csv``).
        settings: The study.
    """
    metrics = whole_table(results, settings)
    legend = "; ".join(f"{entry.short}: {entry.meaning}" for entry in metrics.metrics)
    table = Table(
        # Text, not str: square brackets in a label are not markup.
        title=Text(settings.title),
        caption=Text(f"All in %; after an attack, {settings.ratio_words}. {legend}."),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", min_width=12, max_width=LABEL_WIDTH, overflow="fold")
    for entry in metrics.metrics:
        table.add_column(entry.short, justify="right", no_wrap=True)
    for group in metrics.groups:
        table.add_row(Text(group.title, style="bold"))
        for row in group.rows:
            table.add_row(Text(f"  {row.label}"), *(_cell(cell, "–") for cell in row.cells))
        table.add_section()
    return table


def _cell(cell: Estimate | None, missing: str) -> str:
    return missing if cell is None else percent(cell.value)
