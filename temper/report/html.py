"""Build the report of a finished study: every file, and the HTML page that needs no other."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from temper.errors import TemperError
from temper.report.aggregate import mean_cost, percent
from temper.report.collect import Answer, Collected, collect, examples, study_card, write_csv
from temper.report.figures import Figure, panel_svg, study_figures, write_png
from temper.report.findings import Headline, headline
from temper.report.table import after_table, before_table, jailbreak_rows, latex_table, whole_table
from temper.run_folder import write_text
from temper.study.settings import Study

RESULTS_FILE = "results.csv"
COSTS_FILE = "costs.csv"
LATEX_FILE = "results.tex"
FIGURES_FOLDER = "figures"
REPORT_FILE = "report.html"
TEMPLATES = Path(__file__).parent
COST_TITLES = {
    "steps": "Steps",
    "passes": "Passes",
    "forwards": "Forward passes",
    "tokens": "Tokens",
    "seconds": "Seconds",
    "peak_memory_mib": "Peak memory, MiB",
}


def build_report(study_folder: Path, settings: Study) -> Path:
    """Write a study's results, costs, LaTeX table, figures and HTML report.

    Args:
        study_folder: ``runs/<study>``, with every stage finished.
        settings: The study.

    Returns:
        Path of the HTML report.

    Raises:
        TemperError: A stage is not finished, or the study's YAML is incomplete.
    """
    collected = collect(study_folder, settings)
    write_csv(collected.results, study_folder / RESULTS_FILE)
    write_csv(collected.costs, study_folder / COSTS_FILE)
    write_text(study_folder / LATEX_FILE, latex_table(collected.results, settings))
    figures = study_figures(collected.results, study_folder, settings)
    for figure in figures:
        write_png(figure, study_folder / FIGURES_FOLDER / f"{figure.name}.png")
    found = headline(collected.results, settings)
    answers = examples(study_folder, settings)
    report = study_folder / REPORT_FILE
    write_text(report, render(collected, figures, found, settings, answers))
    return report


def render(
    collected: Collected,
    figures: list[Figure],
    found: Headline,
    settings: Study,
    answers: Sequence[tuple[str, list[Answer]]] = (),
) -> str:
    """The HTML page.

    Args:
        collected: Results, costs and run cards.
        figures: Figures to draw.
        found: The finding that the page opens with.
        settings: The study; the page shows its YAML.
        answers: Prompts and the models' answers, if they may be shown.
    """
    results = collected.results
    # Where methods act after the alignment; otherwise it is the cost of the attack, equal for all.
    acts_later = any(route.aligned_by != key for key, route in settings.routes.items())
    return _template().render(
        settings=settings,
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        sentence=found.sentence(),
        notes=[*found.notes(), *_judge_notes(collected.judges)],
        after=after_table(results, settings),
        before=before_table(results, settings),
        legend=whole_table(results, settings).metrics,
        jailbreaks=jailbreak_rows(results, settings),
        every_ratio=after_table(results, settings, every_ratio=True),
        figures=[
            (figure, [Markup(panel_svg(figure, i)) for i in range(len(figure.panels))])
            for figure in figures
        ],
        cost_columns=list(COST_TITLES.values()),
        costs=_costs(collected, settings, "aligned"),
        later_costs=_costs(collected, settings, "attacked") if acts_later else [],
        sections={
            str(key): yaml.safe_dump({key: section}, sort_keys=False, allow_unicode=True)
            for key, section in settings.as_yaml().items()
        },
        card=study_card(collected.cards, settings),
        judges=", ".join(collected.judges),
        answers=answers,
    )


def main(arguments: list[str] | None = None) -> int:
    """Build the report of a study folder; exit status 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(
        prog="temper report", description="Build the report of a finished study."
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


def _template() -> Template:
    # Escaping is on for all texts; drawings and style are made here, and marked as safe.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["unbroken"] = lambda text: text.replace(" %", "\u00a0%")
    return environment.get_template("template.html.jinja")


def _costs(collected: Collected, settings: Study, stage: str) -> list[tuple[str, list[str]]]:
    """Label and costs of every objective, in the order of `COST_TITLES`."""
    rows = []
    for objective, label in settings.objectives.items():
        values = [
            mean_cost(frame, name, objective, stage)
            for name in COST_TITLES
            for frame in (collected.results, collected.costs)
        ]
        # Every cost is in one of the two frames.
        rows.append((label, [_number(value) for value in values if value is not None]))
    return rows


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value.is_integer() else f"{value:.1f}"


def _judge_notes(judges: tuple[str, ...]) -> list[str]:
    if len(judges) == 1:
        return []
    return [
        f"The stages were judged by different judges ({', '.join(judges)}): their metrics are not"
        " comparable."
    ]


if __name__ == "__main__":
    sys.exit(main())
