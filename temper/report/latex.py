"""The result as a booktabs table."""

from typing import Any

import pandas as pd

from temper.report.aggregate import Estimate
from temper.report.settings import read_settings
from temper.report.table import whole_table

SHORT = {
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


def latex_table(results: pd.DataFrame, study: dict[str, Any]) -> str:
    """Every model before the attack and after each, in %, means over seeds.

    Args:
        results: The tidy table (``results.csv``).
        study: The study's YAML.
    """
    settings = read_settings(study)
    figures = whole_table(results, settings)
    legend = "; ".join(map(": ".join, figures.legend(SHORT)))
    names = [SHORT[metric] for metric in figures.metrics]
    seeds = "one seed" if len(settings.seeds) == 1 else f"mean over {len(settings.seeds)} seeds"
    title = settings.title if settings.title.endswith((".", "?", "!")) else f"{settings.title}."
    lines = [
        "% Needs \\usepackage{booktabs}.",
        r"\begin{table}",
        r"  \centering\small\setlength{\tabcolsep}{4pt}",
        f"  \\caption{{{escape(title)} All in \\%, {seeds}; after an attack, {escape(settings.ratio_words)}. {legend}.}}",
        rf"  \begin{{tabular}}{{l{'r' * len(names)}}}",
        r"    \toprule",
        f"    {' & '.join(['Model', *names])} \\\\",
    ]
    for group in figures.groups:
        lines += [r"    \midrule", rf"    \multicolumn{{{len(names) + 1}}}{{l}}{{\emph{{{escape(group.title)}}}}} \\"]
        lines += [f"    {' & '.join([escape(row.label), *map(_cell, row.cells)])} \\\\" for row in group.rows]
    lines += [r"    \bottomrule", r"  \end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _cell(figure: Estimate | None) -> str:
    return "--" if figure is None else f"{100 * figure.value:.1f}"
