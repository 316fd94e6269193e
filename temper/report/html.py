"""The report: one file that needs nothing from outside."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from temper.report.aggregate import mean_cost
from temper.report.cards import study_card
from temper.report.collect import Collected
from temper.report.draw import panel_svg
from temper.report.examples import Answer
from temper.report.figures import Figure
from temper.report.findings import Headline
from temper.report.settings import Settings
from temper.report.table import after_table, before_table, jailbreak_rows, whole_table

HERE = Path(__file__).parent
COSTS = {
    "steps": "Steps",
    "passes": "Passes",
    "forwards": "Forward passes",
    "tokens": "Tokens",
    "seconds": "Seconds",
    "peak_memory_mib": "Peak memory, MiB",
}


def render(
    collected: Collected,
    figures: list[Figure],
    found: Headline,
    study: dict[str, Any],
    settings: Settings,
    answers: Sequence[tuple[str, list[Answer]]] = (),
) -> str:
    """Write the report.

    Args:
        collected: What the study's folders hold.
        figures: Figures to draw into it.
        found: The finding it opens with.
        study: The study's YAML, shown in full.
        settings: The same, read.
        answers: Prompts and what the models said to them, if they may be shown.
    """
    # Escaping is on for everything; drawings and style are made here and let through.
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}"
    environment.filters["unbroken"] = lambda text: text.replace(" %", "\u00a0%")
    return environment.get_template("template.html.jinja").render(
        settings=settings,
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        sentence=found.sentence(),
        notes=[*found.notes(), *_judge_notes(collected.judges)],
        after=after_table(collected.results, settings),
        before=before_table(collected.results, settings),
        legend=whole_table(collected.results, settings).legend(),
        jailbreaks=jailbreak_rows(collected.results, settings),
        every_ratio=after_table(collected.results, settings, every_ratio=True),
        figures=[(figure, [Markup(panel_svg(figure, i)) for i in range(len(figure.panels))]) for figure in figures],
        cost_columns=list(COSTS.values()),
        costs=_costs(collected, settings, "aligned"),
        # Of interest where methods act later; otherwise it is the attack's, the same for all.
        later_costs=_costs(collected, settings, "attacked") if any(r.aligned_by != o for o, r in settings.routes.items()) else [],
        parts={str(key): yaml.safe_dump({key: part}, sort_keys=False, allow_unicode=True) for key, part in study.items()},
        card=study_card(collected.cards, settings),
        judges=", ".join(collected.judges),
        answers=answers,
    )


def _costs(collected: Collected, settings: Settings, stage: str) -> list[tuple[str, list[str]]]:
    rows = []
    for objective, label in settings.objectives.items():
        values = [mean_cost(frame, name, objective, stage) for name in COSTS for frame in (collected.results, collected.costs)]
        # Every cost is in one of the two tables.
        rows.append((label, [_number(value) for value in values if value is not None]))
    return rows


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value.is_integer() else f"{value:.1f}"


def _judge_notes(judges: tuple[str, ...]) -> list[str]:
    if len(judges) == 1:
        return []
    return [f"The stages were judged by different judges ({', '.join(judges)}): their figures are not comparable."]
