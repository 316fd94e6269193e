"""The result on one screen."""

from typing import Any

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from temper.report.aggregate import Estimate
from temper.report.settings import read_settings
from temper.report.table import AFTER, BEFORE, after_rows, before_rows

SHOWN_BEFORE = {"refusal_rate": "ref.", "safe_accuracy": "safe"}
SHOWN_AFTER = {"harmful_score": "HS", "harmful_score_lenient": "HS~", "fine_tune_accuracy": "FA", "refusal_rate": "ref."}
LABEL_WIDTH = 18
KEY_WIDTH = 6


def result_table(results: pd.DataFrame, study: dict[str, Any]) -> Table:
    """Every objective before and after every attack, in %; two attacks fit in 100 columns.

    Args:
        results: The tidy table (``results.csv``).
        study: The study's YAML.
    """
    settings = read_settings(study)
    short = {attack: attack if max(map(len, settings.attacks)) <= KEY_WIDTH else f"A{i}" for i, attack in enumerate(settings.attacks, 1)}
    attacks = "; ".join(f"{short[attack]}: {label}" for attack, label in settings.attacks.items())
    table = Table(
        # Text, not str: a label's square brackets are no markup.
        title=Text(settings.title),
        caption=Text(
            f"All in %. {attacks}; {settings.ratio_words}. HS: unsafe requests carried out in full; HS~: at least half right; "
            "FA: user's task; ref.: unsafe requests refused; safe: safe requests answered right."
        ),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("Objective", min_width=9, max_width=LABEL_WIDTH, overflow="fold")
    for name in SHOWN_BEFORE.values():
        table.add_column(Text(f"before\n{name}"), justify="right", no_wrap=True)
    for key in short.values():
        for name in SHOWN_AFTER.values():
            table.add_column(Text(f"{key}\n{name}"), justify="right", no_wrap=True)
    before = before_rows(results, settings, with_base=False)
    after = {attack: after_rows(results, settings, attack) for attack in settings.attacks}
    for i, row in enumerate(before):
        cells = [row.cells[list(BEFORE).index(metric)] for metric in SHOWN_BEFORE]
        for attack in settings.attacks:
            cells += [after[attack][i].cells[list(AFTER).index(metric)] for metric in SHOWN_AFTER]
        table.add_row(Text(row.label), *(_cell(cell) for cell in cells))
    return table


def _cell(figure: Estimate | None) -> str:
    return "–" if figure is None else f"{100 * figure.value:.1f}"
