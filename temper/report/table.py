"""The figures every table shows, before and after the attack, under one set of names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from temper.report.aggregate import Estimate, estimate
from temper.report.collect import BASE
from temper.study.settings import Study, percent_of

FIGURES = {
    "harmful_score": "HS",
    "harmful_score_lenient": "HS, lenient",
    "fine_tune_accuracy": "FA",
    "refusal_rate": "Refusal",
    "over_refusal_rate": "Over-refusal",
    "safe_accuracy": "Safe accuracy",
    "degenerate_rate": "Degenerate",
}
# What they are, in words that are true of every judge: not all have a middle label, or know a right
# answer when they see one.
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


def before_table(results: pd.DataFrame, settings: Study) -> FigureTable:
    """The base model and every aligned model, before any attack."""
    return _measured([_before(results, settings)])


def after_table(results: pd.DataFrame, settings: Study, every_ratio: bool = False) -> FigureTable:
    """Every objective after every attack.

    Args:
        results: The tidy table.
        settings: The study.
        every_ratio: One group per harmful ratio; otherwise the mean over those above 0.
    """
    return _measured(_after(results, settings, every_ratio))


def whole_table(results: pd.DataFrame, settings: Study) -> FigureTable:
    """Both: before any attack, then after each."""
    after = [Group(f"After: {group.title}", group.rows) for group in _after(results, settings)]
    return _measured([_before(results, settings), *after])


def jailbreak_rows(results: pd.DataFrame, settings: Study) -> tuple[list[str], list[Row]]:
    """Attack success rate of every jailbreak prompt kind measured, before any attack; empty if none
    was.
    """
    kinds = [metric for metric in results["metric"].unique() if metric.startswith("asr/")]
    models = {BASE: BASE_LABEL} | settings.objectives
    rows = [
        Row(label, [estimate(results, metric, objective) for metric in kinds])
        for objective, label in models.items()
    ]
    return [kind.removeprefix("asr/").removeprefix("jb_").replace("_", " ") for kind in kinds], (
        rows if kinds else []
    )


def _before(results: pd.DataFrame, settings: Study) -> Group:
    return Group("Before the attack", _rows(results, {BASE: BASE_LABEL} | settings.objectives))


def _after(results: pd.DataFrame, settings: Study, every_ratio: bool = False) -> list[Group]:
    if every_ratio:
        places = [
            (attack, f"{title}, p = {percent_of(p)}", [p])
            for attack, title in settings.attacks.items()
            for p in settings.ratios
        ]
    else:
        places = [
            (attack, title, list(settings.counted_ratios))
            for attack, title in settings.attacks.items()
        ]
    return [
        Group(title, _rows(results, settings.objectives, attack, ratios))
        for attack, title, ratios in places
    ]


def _rows(
    results: pd.DataFrame,
    models: Mapping[str, str],
    attack: str | None = None,
    ratios: Sequence[float] | None = None,
) -> list[Row]:
    """One row per model, given by key and label, with all figures."""
    return [
        Row(label, [estimate(results, metric, key, attack, ratios) for metric in FIGURES])
        for key, label in models.items()
    ]


def _measured(groups: list[Group]) -> FigureTable:
    """Groups as a table, without the columns that nothing in it was measured for."""
    kept = [
        i
        for i in range(len(FIGURES))
        if any(row.cells[i] is not None for group in groups for row in group.rows)
    ]
    rows = [
        Group(group.title, [Row(row.label, [row.cells[i] for i in kept]) for row in group.rows])
        for group in groups
    ]
    return FigureTable([list(FIGURES)[i] for i in kept], rows)


# MERGED from temper.report.table: The result as a booktabs table.


LATEX_NAMES = {
    "harmful_score": "HS",
    "harmful_score_lenient": "HS$_\\ell$",
    "fine_tune_accuracy": "FA",
    "refusal_rate": "Ref.",
    "over_refusal_rate": "Over",
    "safe_accuracy": "Safe",
    "degenerate_rate": "Deg.",
}
SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "[": "{[}",  # bare, it would be an option of the line break before it
    "|": r"\textbar{}",
} | {letter: f"\\{letter}" for letter in "&%$#_{}"}


def escape(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(SPECIAL.get(letter, letter) for letter in " ".join(text.split()))


def latex_table(results: pd.DataFrame, settings: Study) -> str:
    """Every model before the attack and after each, in %, means over seeds.

    Args:
        results: The tidy table (``results.csv``).
        settings: The study.
    """
    figures = whole_table(results, settings)
    legend = "; ".join(map(": ".join, figures.legend(LATEX_NAMES)))
    names = [LATEX_NAMES[metric] for metric in figures.metrics]
    seeds = "one seed" if len(settings.seeds) == 1 else f"mean over {len(settings.seeds)} seeds"
    title = settings.title if settings.title.endswith((".", "?", "!")) else f"{settings.title}."
    lines = [
        "% Needs \\usepackage{booktabs}.",
        r"\begin{table}",
        r"  \centering\small\setlength{\tabcolsep}{4pt}",
        (
            f"  \\caption{{{escape(title)} All in \\%, {seeds}; after an attack,"
            f" {escape(settings.ratio_words)}. {legend}.}}"
        ),
        rf"  \begin{{tabular}}{{l{'r' * len(names)}}}",
        r"    \toprule",
        f"    {' & '.join(['Model', *names])} \\\\",
    ]
    for group in figures.groups:
        lines += [
            r"    \midrule",
            rf"    \multicolumn{{{len(names) + 1}}}{{l}}{{\emph{{{escape(group.title)}}}}} \\",
        ]
        lines += [
            f"    {' & '.join([escape(row.label), *map(_latex_cell, row.cells)])} \\\\"
            for row in group.rows
        ]
    lines += [r"    \bottomrule", r"  \end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _latex_cell(figure: Estimate | None) -> str:
    return "--" if figure is None else f"{100 * figure.value:.1f}"


# MERGED from temper.report.table: The result on one screen.


TERMINAL_NAMES = {
    "harmful_score": "HS",
    "harmful_score_lenient": "HS~",
    "fine_tune_accuracy": "FA",
    "refusal_rate": "ref.",
    "over_refusal_rate": "over",
    "safe_accuracy": "safe",
    "degenerate_rate": "deg.",
}
LABEL_WIDTH = 28


def result_table(results: pd.DataFrame, settings: Study) -> Table:
    """Every model before the attack and after each, in %; fits in 90 columns however many attacks
    there are.

    Args:
        results: The tidy table (``results.csv``).
        settings: The study.
    """
    figures = whole_table(results, settings)
    legend = "; ".join(map(": ".join, figures.legend(TERMINAL_NAMES)))
    table = Table(
        # Text, not str: a label's square brackets are no markup.
        title=Text(settings.title),
        caption=Text(f"All in %; after an attack, {settings.ratio_words}. {legend}."),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", min_width=12, max_width=LABEL_WIDTH, overflow="fold")
    for metric in figures.metrics:
        table.add_column(TERMINAL_NAMES[metric], justify="right", no_wrap=True)
    for group in figures.groups:
        table.add_row(Text(group.title, style="bold"))
        for row in group.rows:
            table.add_row(Text(f"  {row.label}"), *map(_terminal_cell, row.cells))
        table.add_section()
    return table


def _terminal_cell(figure: Estimate | None) -> str:
    return "–" if figure is None else f"{100 * figure.value:.1f}"
