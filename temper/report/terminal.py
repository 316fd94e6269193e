"""The result on one screen."""

from typing import Any

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from temper.report.aggregate import Estimate
from temper.report.settings import read_settings
from temper.report.table import whole_table

SHORT = {
    "harmful_score": "HS",
    "harmful_score_lenient": "HS~",
    "fine_tune_accuracy": "FA",
    "refusal_rate": "ref.",
    "over_refusal_rate": "over",
    "safe_accuracy": "safe",
    "degenerate_rate": "deg.",
}
LABEL_WIDTH = 28


def result_table(results: pd.DataFrame, study: dict[str, Any]) -> Table:
    """Every model before the attack and after each, in %; fits in 90 columns however many attacks there are.

    Args:
        results: The tidy table (``results.csv``).
        study: The study's YAML.
    """
    settings = read_settings(study)
    figures = whole_table(results, settings)
    legend = "; ".join(map(": ".join, figures.legend(SHORT)))
    table = Table(
        # Text, not str: a label's square brackets are no markup.
        title=Text(settings.title),
        caption=Text(f"All in %; after an attack, {settings.ratio_words}. {legend}."),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", min_width=12, max_width=LABEL_WIDTH, overflow="fold")
    for metric in figures.metrics:
        table.add_column(SHORT[metric], justify="right", no_wrap=True)
    for group in figures.groups:
        table.add_row(Text(group.title, style="bold"))
        for row in group.rows:
            table.add_row(Text(f"  {row.label}"), *map(_cell, row.cells))
        table.add_section()
    return table


def _cell(figure: Estimate | None) -> str:
    return "–" if figure is None else f"{100 * figure.value:.1f}"
