"""Tables of a report: their columns and legends, in LaTeX and in a terminal."""

import html
import io
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from temper.metrics.table import BY_COLUMN
from temper.report.collect import collect
from temper.report.html import build_report
from temper.report.table import (
    MetricTable,
    after_table,
    before_table,
    latex_table,
    latex_text,
    result_table,
    whole_table,
)
from temper.study.settings import Study

COLUMNS = [entry.column for entry in BY_COLUMN]


def columns(table: MetricTable) -> list[str]:
    return [entry.column for entry in table.metrics]


def tables(results: pd.DataFrame, study: Study) -> tuple[list[str], list[str]]:

    return columns(before_table(results, study)), columns(after_table(results, study))


@pytest.fixture
def made(make_study) -> tuple[Path, Study, pd.DataFrame]:
    runs, study = make_study()
    return runs, study, collect(runs, study).results


def test_harm_over_refusal_and_accuracy_stand_before_and_after(make_study):
    runs, study = make_study()
    for path in (
        *runs.glob("seed0/align/*/evaluation.json"),
        runs / "seed0/instruct/evaluation.json",
    ):
        content = json.loads(path.read_text())
        content["metrics"]["fine_tune_accuracy"] = content["metrics"]["harmful_score"] | {
            "value": 0.125
        }
        path.write_text(json.dumps(content))
    results = collect(runs, study).results
    assert tables(results, study) == (COLUMNS, COLUMNS)
    assert {"HS", "FA", "Over-refusal"} <= set(COLUMNS)
    assert [row.cells[2].value for row in before_table(results, study).groups[0].rows] == [
        0.125
    ] * 3


def test_what_no_stage_measured_has_no_column(made):
    _, study, results = made
    without_task = [title for title in COLUMNS if title != "FA"]
    assert tables(results, study) == (
        without_task,
        COLUMNS,
    ), "the synthetic studies measure FA after the attack only"
    before, *after = whole_table(results, study).groups
    assert all(row.cells[2] is None for row in before.rows) and all(
        row.cells[2] for group in after for row in group.rows
    )
    assert tables(results[results["metric"] != "fine_tune_accuracy"], study) == (
        without_task,
        without_task,
    )
    assert "FA" not in latex_table(results[results["metric"] != "fine_tune_accuracy"], study)


def test_a_metric_measured_only_before_is_explained_too(made):
    runs, study, _ = made
    for path in runs.glob("seed0/attack/**/evaluation.json"):
        content = json.loads(path.read_text())
        del content["metrics"]["over_refusal_rate"]
        path.write_text(json.dumps(content))
    page = build_report(runs, study).read_text()
    (entry,) = [entry for entry in BY_COLUMN if entry.key == "over_refusal_rate"]
    assert page.count(f'<th scope="col">{entry.column}</th>') == 1
    assert f"<b>{entry.column}</b>: {entry.meaning}" in page


def test_attacks_of_one_label_are_two_groups(make_study, study_of):
    study = study_of(attacks={key: {"label": "attack"} for key in ("mild", "hard")})
    runs, study = make_study(study)
    assert [group.title for group in after_table(collect(runs, study).results, study).groups] == [
        "attack"
    ] * 2


def test_every_ratio_is_a_group(made):
    _, study, results = made
    titles = [group.title for group in after_table(results, study, every_ratio=True).groups]
    assert len(titles) == 2 * 3 and titles[:2] == [
        "milder attack, p = 0 %",
        "milder attack, p = 5 %",
    ]


def test_legends_hold_for_every_judge(made):
    """Only the grammar judge has half-right answers, and knows a right one when it sees it."""
    runs, study, results = made
    page = html.unescape(build_report(runs, study).read_text())
    texts = [page, latex_table(results, study), str(result_table(results, study).caption)]
    for text in texts:
        assert not any(words in text for words in ("half right", "half-right", "answered right"))
        assert all(entry.meaning in text for entry in BY_COLUMN)


# -- LaTeX and terminal


def test_latex_is_escaped_and_every_line_has_all_cells(hostile):
    text = (hostile[0] / "results.tex").read_text()
    before, mild, hard = [
        part.strip().splitlines()
        for part in text[: text.index(r"\bottomrule")].split(r"\midrule")[1:]
    ]
    titles = ("Before the attack", "After: milder attack", "After: harder attack")
    assert [group[0] for group in (before, mild, hard)] == [
        rf"\multicolumn{{8}}{{l}}{{\emph{{{title}}}}} \\" for title in titles
    ]
    assert [len(re.findall(r"(?<!\\)&", line)) for line in (*before[1:], *mild[1:], *hard[1:])] == [
        7
    ] * 7
    assert before[2].strip() == r"SFT & 1.0 & 2.0 & -- & 98.0 & 3.0 & 96.0 & 1.0 \\"
    assert mild[1].strip() == r"SFT & 30.5 & 40.5 & 88.0 & 69.5 & 2.0 & 94.0 & 1.0 \\"
    assert hard[1].strip() == r"SFT & 45.5 & 55.5 & 88.0 & 54.5 & 2.0 & 94.0 & 1.0 \\"
    assert r"Model & HS & HS$_\ell$ & FA & Ref. & Over & Safe & Deg. \\" in text


def test_latex_has_its_special_characters_escaped():
    assert (
        latex_text("50% & $x_1$ #{a}~^\\")
        == r"50\% \& \$x\_1\$ \#\{a\}\textasciitilde{}\textasciicircum{}\textbackslash{}"
    )
    assert latex_text("[a] < b\n> c") == r"{[}a] \textless{} b \textgreater{} c"


def test_the_terminal_table_fits_and_shows_means(make_study, study_of):
    attacks = {f"attack{i}": {"label": f"attack at lr {i}e-4"} for i in range(3)}
    study = study_of(
        attacks=attacks,
        headline=None,
        objectives={"sft": {"label": "SFT"}, "booster": {"label": "Booster and " * 3 + "[red]"}},
    )
    runs, study = make_study(study, lambda objective, attack, ratio, seed: 10 * ratio)
    table = result_table(collect(runs, study).results, study)
    console = Console(width=110, record=True, file=io.StringIO())
    assert console.measure(table).maximum <= 90
    console.print(table)
    lines = console.export_text().splitlines()
    after = ["75.0", "80.0", "88.0", "25.0", "2.0", "94.0", "1.0"]
    sft = [line.split()[1:] for line in lines if re.match(r" +SFT +\d", line)]
    assert sft == [["1.0", "2.0", "–", "98.0", "3.0", "96.0", "1.0"], *[after] * 3]
    headings = [line.strip() for line in lines if line.strip().startswith(("Before", "After:"))]
    assert headings == ["Before the attack", *(f"After: attack at lr {i}e-4" for i in range(3))]
    assert any("[red]" in line for line in lines)
