"""Figures of a report: the numbers that they draw."""

import pandas as pd
import pytest

from temper.report.collect import collect
from temper.report.figures import COLOURS, _apart, panel_svg, study_figures


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
    # A fit of fewer steps than trainer.log_every_n_steps leaves none.
    (runs / "seed0/attack/sft/hard/p0.1/metrics.csv").unlink()
    assert "probe_loss" not in [figure.name for figure in study_figures(results, runs, study)]


def test_labels_at_line_ends_do_not_cover_one_another():
    heights = _apart([0.99, 0.99, 1.0], [1, 2, 1])
    assert heights == sorted(heights) and heights[-1] < 1
    assert heights[1] - heights[0] >= 0.12 and heights[2] - heights[1] >= 0.12
