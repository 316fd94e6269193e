"""LaTeX, terminal, figures, HTML."""

import html
import io
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from rich.console import Console

from temper.errors import TemperError
from temper.report.collect import collect
from temper.report.figures import COLOURS, _apart, panel_svg, study_figures
from temper.report.html import main
from temper.report.table import latex_text, result_table

HOSTILE = '<script>alert("x")</script> $\\frac{1}$ & [red]50%'


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, study_of, fabricate):
    """A study with labels that would break every format if not escaped, built once."""

    study = study_of(
        seeds=[0, 1], objectives={"sft": {"label": "SFT"}, "booster": {"label": HOSTILE}}
    )
    runs, study = fabricate(tmp_path_factory.mktemp("hostile"), study)
    assert main([str(runs)]) == 0
    return runs, study


class Page(HTMLParser):
    """Tags and attributes of a page; complains about a tag closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags = []
        self.open = []
        self.ids = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_build_leaves_every_file(hostile):
    runs, _ = hostile
    names = {
        str(path.relative_to(runs))
        for path in runs.rglob("*")
        if path.is_file() and "seed" not in str(path.relative_to(runs))
    }
    figures = {
        f"figures/{name}.png"
        for name in ("harmful_score", "fine_tune_accuracy", "refusal_rate", "probe_loss")
    }
    assert (
        names == {"study.yaml", "results.csv", "costs.csv", "results.tex", "report.html"} | figures
    )
    assert (runs / "figures/harmful_score.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_needs_nothing_from_outside(hostile):
    text = (hostile[0] / "report.html").read_text()
    page = Page(text)
    assert not page.open
    assert not {"link", "img", "iframe", "object", "embed", "base", "script"} & {
        tag for tag, _ in page.tags
    }
    references = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset")
    ]
    assert references and all(value.startswith("#") for value in references)
    assert "http" not in text and "@import" not in text
    references += re.findall(r"url\(([^)]*)\)", text)
    assert all(reference.startswith("#") for reference in references)
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in references} <= set(page.ids)
    assert (
        "meta",
        {"name": "viewport", "content": "width=device-width, initial-scale=1"},
    ) in page.tags
    assert "prefers-color-scheme: dark" in text


def test_a_hostile_label_is_text_everywhere(hostile):
    text = (hostile[0] / "report.html").read_text()
    assert "<script" not in text
    assert html.escape(HOSTILE, quote=False).replace('"', "&#34;") in text


def test_the_report_has_the_finding_first_and_all_facts(hostile):
    text = html.unescape((hostile[0] / "report.html").read_text()).replace("\u00a0", " ")
    lead = re.search(r'<p class="lead">(.*?)</p>', text, re.DOTALL).group(1)
    assert lead.startswith("Under the milder attack")
    assert text.index('class="lead"') < text.index("<table") < text.index("<svg")
    for part in (
        "grammar",
        "0123abc",
        "2.13.0",
        "a" * 64,
        "1,234,567",
        "Base model",
        "co task",
        "bootstrap over seeds",
    ):
        assert part in text
    assert all(f"<summary>{part}</summary>" in text for part in hostile[1].as_yaml())


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


def test_figures_have_the_numbers(make_study):
    runs, study = make_study()
    figures = {
        figure.name: figure for figure in study_figures(collect(runs, study).results, runs, study)
    }
    mild, hard = figures["harmful_score"].panels
    assert (mild.title, hard.title) == ("milder attack", "harder attack")
    strict = next(line for line in mild.lines if line.label == "Booster" and not line.second)
    assert strict.x == pytest.approx([0, 5, 10]) and strict.y == pytest.approx([0, 10, 20])
    assert strict.band[0][1] < 10 < strict.band[1][1]
    assert [line.y for line in mild.lines if line.label == "Booster" and line.second] == [
        pytest.approx([10, 20, 30])
    ]
    probe = figures["probe_loss"].panels[0].lines[0]
    assert probe.x == [float(step) for step in range(0, 201, 20)] and probe.y[:2] == pytest.approx(
        [6.0, 5.2]
    )
    drawing = panel_svg(figures["harmful_score"], 0)
    assert drawing == panel_svg(figures["harmful_score"], 0)
    assert COLOURS[0].lower() in drawing and COLOURS[1].lower() in drawing


def test_a_study_without_the_probe_has_no_such_figure(make_study):
    runs, study = make_study()
    results = collect(runs, study).results
    for path in runs.rglob("metrics.csv"):
        pd.read_csv(path).drop(columns="probe/harmful_loss").to_csv(path, index=False)
    assert "probe_loss" not in [figure.name for figure in study_figures(results, runs, study)]
    (runs / "seed0/attack/sft/hard/p0.1/metrics.csv").unlink()
    with pytest.raises(TemperError, match=r"metrics\.csv: missing"):
        study_figures(results, runs, study)


def test_labels_at_line_ends_do_not_cover_one_another():
    heights = _apart([0.99, 0.99, 1.0], [1, 2, 1])
    assert heights == sorted(heights) and heights[-1] < 1
    assert heights[1] - heights[0] >= 0.12 and heights[2] - heights[1] >= 0.12
