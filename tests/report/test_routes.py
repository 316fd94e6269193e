"""The report of a study whose objectives act at different times."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from temper.errors import TemperError
from temper.report.collect import collect
from temper.report.figures import study_figures
from temper.report.html import build_report

OBJECTIVES = {
    "sft": {"label": "SFT"},
    "further": {"label": "Further", "aligned_by": "sft", "edit": ["interpolate"]},
    "repaired": {
        "label": "Repaired",
        "aligned_by": "sft",
        "repair": {"set": {"trainer.max_steps": 1}},
    },
    "watched": {"label": "Watched", "aligned_by": "sft", "repair": {"verb": "validate"}},
}
SCORES = {"sft": 0.8, "further": 0.6, "repaired": 0.1, "watched": 0.4}


@pytest.fixture
def routed(tmp_path: Path, study_of, fabricate):
    """A study with metrics of every objective in the folders of its route."""
    study = study_of(
        objectives=OBJECTIVES,
        headline={"attack": "mild", "baseline": "sft", "method": "repaired"},
        harmful_ratios=[0.1],
    )
    runs, study = fabricate(tmp_path, study, lambda objective, *_: SCORES[objective])
    seed = runs / "seed0"
    (seed / "align" / "further" / "card.json").unlink()  # an edit trains nothing
    for name in ("repaired", "watched"):
        shutil.rmtree(seed / "align" / name)
        (seed / "repair").mkdir(exist_ok=True)
        (seed / "attack" / name).rename(seed / "repair" / name)
        for file in (seed / "repair" / name).rglob("metrics.csv"):
            file.unlink()
    for file in (seed / "repair" / "watched").rglob("card.json"):
        file.unlink()  # an evaluation has none
    return runs, study


def test_metrics_are_of_the_last_folder_and_costs_of_all(routed):
    runs, study = routed
    assert "Cost after the alignment" in build_report(runs, study).read_text()
    results = pd.read_csv(runs / "results.csv")
    costs = pd.read_csv(runs / "costs.csv")
    after = results[
        (results["stage"] == "attacked")
        & (results["metric"] == "harmful_score")
        & (results["attack"] == "mild")
    ]
    assert dict(zip(after["objective"], after["value"], strict=True)) == SCORES
    before = results[(results["stage"] == "aligned") & (results["metric"] == "refusal_rate")]
    assert set(before["objective"]) == set(OBJECTIVES) and set(before["value"]) == {0.98}
    spent = costs[(costs["attack"] == "mild") & (costs["metric"] == "cost/seconds")]
    assert dict(zip(spent["objective"], spent["value"], strict=True)) == {
        "sft": 20,
        "further": 20,
        "repaired": 40,
        "watched": 20,
    }
    passes = results[(results["stage"] == "aligned") & (results["metric"] == "cost/passes")]
    assert set(passes["value"]) == {600}


def test_attack_curves_are_drawn_for_attacked_objectives(routed):
    runs, study = routed
    figures = {
        figure.name: figure for figure in study_figures(collect(runs, study).results, runs, study)
    }
    assert [line.label for line in figures["probe_loss"].panels[0].lines] == ["SFT", "Further"]


def test_a_trained_repair_without_a_card_is_missing(routed):
    runs, study = routed
    next((runs / "seed0" / "repair" / "repaired").rglob("card.json")).unlink()
    with pytest.raises(TemperError, match=r"repair/repaired/.*card.json: missing"):
        collect(runs, study)


def test_more_objectives_than_distinct_lines_are_in_tables_only(
    tmp_path: Path, study_of, fabricate
):
    study = study_of(
        objectives={f"o{i}": {"label": str(i)} for i in range(10)},
        headline=None,
        harmful_ratios=[0.1],
    )
    runs, study = fabricate(tmp_path, study, lambda *_: 0.5)
    assert study_figures(collect(runs, study).results, runs, study) == []
    assert build_report(runs, study).exists()
