"""The report as one HTML page, and the files that a build leaves."""

import html
import re

from tests.page import Page


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


def test_a_hostile_label_is_text_everywhere(hostile, hostile_label):
    text = (hostile[0] / "report.html").read_text()
    assert "<script" not in text
    assert html.escape(hostile_label, quote=False).replace('"', "&#34;") in text


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
