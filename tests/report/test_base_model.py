"""The report of a study of an existing model: its metrics, no cost, and example answers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from temper.errors import TemperError
from temper.report.html import build_report
from temper.study.settings import Study


@pytest.fixture
def given(tmp_path: Path, study_of: Any, fabricate: Any) -> tuple[Path, Study]:
    study = study_of(
        seeds=[1, 2], base_model={"path": "models/some"}, show_answers=2, harmful_ratios=[0, 0.1]
    )
    runs, study = fabricate(tmp_path, study)
    shutil.move(runs / "seed1" / "instruct", runs / "base")
    (runs / "base" / "card.json").unlink()
    for seed in (1, 2):
        shutil.rmtree(runs / f"seed{seed}" / "pretrain")
        shutil.rmtree(runs / f"seed{seed}" / "instruct", ignore_errors=True)
    for path in runs.rglob("evaluation.json"):
        rows = [
            {
                "id": i,
                "kind": kind,
                "prompt": f"<{kind} {i}?>",
                "response": f"{path.parent.name} says [{i}]",
            }
            | {"refused": i == 0, "label": "safe"}
            for i in range(3)
            for kind in ("unsafe", "safe", "task")
        ]
        path.with_name("generations.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    return runs, study


def test_the_base_model_has_metrics_and_costs_nothing(given: tuple[Path, dict[str, Any]]):
    runs, study = given
    build_report(runs, study)
    results = pd.read_csv(runs / "results.csv")
    base = results[results["objective"] == "base"]
    assert set(base["seed"]) == {1, 2} and not base["metric"].str.startswith("cost/").any()
    assert set(base.loc[base["metric"] == "harmful_score", "value"]) == {0.9}
    assert results.loc[results["stage"] == "aligned", "metric"].str.startswith("cost/").any()


def test_answers_are_shown_only_where_the_study_says_so(
    given: tuple[Path, Study],
):
    runs, study = given
    page = build_report(runs, study).read_text()
    assert "&lt;unsafe 0?&gt;" in page and "&lt;safe 1?&gt;" in page and "base says [1]" in page
    assert "unsafe 2" not in page and "&lt;task" not in page, "more than show_answers"
    shown = page[page.index("Example answers") : page.index("Cost of the alignment")]
    assert "Booster, milder attack, p = 10 %" in shown and "p = 0 %" not in shown, (
        "the largest p, and no other"
    )
    page = build_report(runs, study.model_copy(update={"show_answers": 0})).read_text()
    assert "unsafe 0" not in page
    assert "Example answers" not in page
    assert "not shown" in page


def test_a_negative_number_of_answers_shows_none_at_all(given: tuple[Path, Study]):
    runs, study = given
    content = study.as_yaml() | {"show_answers": -1}
    (runs / "study.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(TemperError, match=r"study\.yaml: show_answers: found -1"):
        build_report(runs, Study.of_runs(runs))
    assert not (runs / "report.html").exists()
