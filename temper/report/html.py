"""The report: one file that needs nothing from outside."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from temper.errors import TemperError
from temper.report.aggregate import mean_cost
from temper.report.collect import Answer, Collected, collect, examples, study_card, write_csv
from temper.report.figures import Figure, panel_svg, study_figures, write_png
from temper.report.findings import Headline, headline
from temper.report.table import after_table, before_table, jailbreak_rows, latex_table, whole_table
from temper.run_folder import write_text
from temper.study.settings import Study

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
    settings: Study,
    answers: Sequence[tuple[str, list[Answer]]] = (),
) -> str:
    """Write the report.

    Args:
        collected: What the study's folders hold.
        figures: Figures to draw into it.
        found: The finding it opens with.
        settings: The study; its YAML is shown in full.
        answers: Prompts and what the models said to them, if they may be shown.
    """
    # Escaping is on for everything; drawings and style are made here and let through.
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
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
        figures=[
            (figure, [Markup(panel_svg(figure, i)) for i in range(len(figure.panels))])
            for figure in figures
        ],
        cost_columns=list(COSTS.values()),
        costs=_costs(collected, settings, "aligned"),
        # Of interest where methods act later; otherwise it is the attack's, the same for all.
        later_costs=(
            _costs(collected, settings, "attacked")
            if any(r.aligned_by != o for o, r in settings.routes.items())
            else []
        ),
        parts={
            str(key): yaml.safe_dump({key: part}, sort_keys=False, allow_unicode=True)
            for key, part in settings.as_yaml().items()
        },
        card=study_card(collected.cards, settings),
        judges=", ".join(collected.judges),
        answers=answers,
    )


def _costs(collected: Collected, settings: Study, stage: str) -> list[tuple[str, list[str]]]:
    rows = []
    for objective, label in settings.objectives.items():
        values = [
            mean_cost(frame, name, objective, stage)
            for name in COSTS
            for frame in (collected.results, collected.costs)
        ]
        # Every cost is in one of the two tables.
        rows.append((label, [_number(value) for value in values if value is not None]))
    return rows


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value.is_integer() else f"{value:.1f}"


def _judge_notes(judges: tuple[str, ...]) -> list[str]:
    if len(judges) == 1:
        return []
    return [
        f"The stages were judged by different judges ({', '.join(judges)}): their figures are not"
        " comparable."
    ]


# MERGED from temper.report.html: A finished study folder -> ``results.csv``, ``costs.csv``,
# ``results.tex``, ``figures/``, ``report.html``.


RESULTS_FILE = "results.csv"
COSTS_FILE = "costs.csv"
LATEX_FILE = "results.tex"
FIGURES_FOLDER = "figures"
REPORT_FILE = "report.html"


def build_report(study_folder: Path, settings: Study) -> Path:
    """Write everything a study's folder can tell.

    Args:
        study_folder: ``runs/<study>``, with every stage finished.
        settings: The study.

    Returns:
        Path of the HTML report.

    Raises:
        TemperError: A stage is not finished, or the study's YAML lacks a part.
    """
    collected = collect(study_folder, settings)
    write_csv(collected.results, study_folder / RESULTS_FILE)
    write_csv(collected.costs, study_folder / COSTS_FILE)
    write_text(study_folder / LATEX_FILE, latex_table(collected.results, settings))
    figures = study_figures(collected.results, study_folder, settings)
    for figure in figures:
        write_png(figure, study_folder / FIGURES_FOLDER / f"{figure.name}.png")
    found = headline(collected.results, settings)
    report = study_folder / REPORT_FILE
    write_text(
        report, render(collected, figures, found, settings, examples(study_folder, settings))
    )
    return report


def main(arguments: list[str] | None = None) -> int:
    """Build the report of a study folder; 2 is the exit status of a mistake a user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m temper.report.html", description="Build the report of a finished study."
    )
    parser.add_argument(
        "runs_folder",
        metavar="RUNS_FOLDER",
        type=Path,
        help="the study's folder, runs/<study>, with study.yaml in it",
    )
    folder: Path = parser.parse_args(arguments).runs_folder
    try:
        print(build_report(folder, Study.of_runs(folder)))
    except TemperError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
