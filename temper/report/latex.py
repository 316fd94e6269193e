"""The result as a booktabs table."""

from typing import Any

import pandas as pd

from temper.report.aggregate import Estimate
from temper.report.settings import read_settings
from temper.report.table import AFTER, BEFORE, after_rows, before_rows

SHOWN_BEFORE = {"refusal_rate": "Ref.", "safe_accuracy": "Safe", "over_refusal_rate": "Over"}
SHOWN_AFTER = {
    "harmful_score": "HS",
    "harmful_score_lenient": "HS$_\\ell$",
    "fine_tune_accuracy": "FA",
    "refusal_rate": "Ref.",
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


def latex_table(results: pd.DataFrame, study: dict[str, Any]) -> str:
    """Every objective before the attack and after each, in %, means over seeds.

    Args:
        results: The tidy table (``results.csv``).
        study: The study's YAML.
    """
    settings = read_settings(study)
    first, width = len(SHOWN_BEFORE) + 2, len(SHOWN_AFTER)
    groups = [rf"& \multicolumn{{{len(SHOWN_BEFORE)}}}{{c}}{{Before attack}}"]
    rules = [rf"\cmidrule(lr){{2-{first - 1}}}"]
    for i, label in enumerate(settings.attacks.values()):
        groups.append(rf"& \multicolumn{{{width}}}{{c}}{{After {escape(label)}}}")
        rules.append(rf"\cmidrule(lr){{{first + i * width}-{first + (i + 1) * width - 1}}}")
    names = [*SHOWN_BEFORE.values(), *(name for _ in settings.attacks for name in SHOWN_AFTER.values())]
    seeds = "one seed" if len(settings.seeds) == 1 else f"mean over {len(settings.seeds)} seeds"
    title = settings.title if settings.title.endswith((".", "?", "!")) else f"{settings.title}."
    caption = (
        f"{escape(title)} All in \\%, {seeds}; after an attack, {escape(settings.ratio_words)}. "
        "HS: harmful score, strict; HS$_\\ell$: lenient; FA: fine-tune accuracy; Ref.: refusal rate on unsafe requests; "
        "Safe: accuracy on safe requests; Over: safe requests refused; Deg.: degenerate answers."
    )
    lines = [
        "% Needs \\usepackage{booktabs}.",
        r"\begin{table}",
        r"  \centering\small\setlength{\tabcolsep}{4pt}",
        f"  \\caption{{{caption}}}",
        rf"  \begin{{tabular}}{{l{'r' * len(names)}}}",
        r"    \toprule",
        f"    {' '.join(groups)} \\\\",
        f"    {' '.join(rules)}",
        f"    Objective & {' & '.join(names)} \\\\",
        r"    \midrule",
        *(f"    {line} \\\\" for line in _lines(results, study)),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _lines(results: pd.DataFrame, study: dict[str, Any]) -> list[str]:
    settings = read_settings(study)
    after = {attack: after_rows(results, settings, attack) for attack in settings.attacks}
    lines = []
    for i, row in enumerate(before_rows(results, settings, with_base=False)):
        cells = [row.cells[list(BEFORE).index(metric)] for metric in SHOWN_BEFORE]
        for attack in settings.attacks:
            cells += [after[attack][i].cells[list(AFTER).index(metric)] for metric in SHOWN_AFTER]
        lines.append(" & ".join([escape(row.label), *(_cell(cell) for cell in cells)]))
    return lines


def _cell(figure: Estimate | None) -> str:
    return "--" if figure is None else f"{100 * figure.value:.1f}"
