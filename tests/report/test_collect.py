"""Stage folders to tidy tables."""

import json

import pandas as pd
import pytest

from temper.errors import TemperError
from temper.report.collect import COLUMNS, collect, write_csv
from temper.report.html import build_report, main
from temper.study.settings import Study


def table(make_study, study=None):
    runs, study = make_study(study)
    collected = collect(runs, study)
    write_csv(collected.results, runs / "results.csv")
    write_csv(collected.costs, runs / "costs.csv")
    return pd.read_csv(runs / "results.csv"), pd.read_csv(runs / "costs.csv")


def test_results_hold_every_stage_once(make_study, study_of):
    results, costs = table(make_study, study_of(seeds=[0, 1]))
    assert tuple(results.columns) == tuple(costs.columns) == COLUMNS
    keys = ["objective", "attack", "harmful_ratio", "seed", "stage", "metric"]
    assert not results.duplicated(keys).any()
    stages = results.drop_duplicates(keys[:-1]).groupby("stage").size()
    assert stages.to_dict() == {"base": 2, "aligned": 4, "attacked": 24}
    assert (
        results[results["stage"] != "attacked"][
            ["attack", "harmful_ratio", "attack_lr", "attack_steps"]
        ]
        .isna()
        .all(axis=None)
    )
    assert set(results[results["stage"] == "base"]["objective"]) == {"base"}


def test_an_attacked_row_is_what_the_evaluation_says(make_study, harmful_score):
    results, _ = table(make_study)
    row = results.query(
        "objective == 'booster' and attack == 'hard' and harmful_ratio == 0.05 and metric =="
        " 'harmful_score'"
    ).iloc[0]
    assert row["value"] == pytest.approx(
        round(200 * harmful_score("booster", "hard", 0.05, 0)) / 200
    )
    assert row["ci_low"] < row["value"] < row["ci_high"] and row["n"] == 200
    assert (row["study"], row["attack_lr"], row["attack_steps"], row["stage"]) == (
        "demo",
        1e-4,
        200,
        "attacked",
    )


def test_counted_costs_are_exact_and_measured_costs_apart(make_study):
    results, costs = table(make_study)
    base = results[results["stage"] == "base"].set_index("metric")["value"]
    assert base["cost/tokens"] == 2 * 1234567  # pretrain and instruct
    assert base["cost/flops"] == 2 * 6 * 333 * 1234567
    assert not {"cost/seconds", "cost/peak_memory_mib"} & set(results["metric"])
    assert set(costs["metric"]) == {"cost/seconds", "cost/peak_memory_mib"}
    measured = costs[costs["stage"] == "base"].set_index("metric")["value"]
    assert measured.to_dict() == {"cost/seconds": 22.0, "cost/peak_memory_mib": 512.5}
    assert results[results["metric"].str.startswith("cost/")][["ci_low", "n"]].isna().all(axis=None)


def test_two_runs_of_a_seed_give_the_same_bytes(make_study):
    first, study = make_study(name="first")
    second, _ = make_study(name="second")
    for card in second.glob("seed0/**/card.json"):
        content = json.loads(card.read_text())
        content["cost"] |= {"seconds": 99.9, "peak_memory_mib": 1.5}
        card.write_text(json.dumps(content))
    for runs in (first, second):
        write_csv(collect(runs, study).results, runs / "results.csv")
    assert (first / "results.csv").read_bytes() == (second / "results.csv").read_bytes()


def test_a_metric_without_cases_is_an_empty_cell(make_study):
    runs, study = make_study()
    path = runs / "seed0/align/sft/evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["metrics"]["refusal_rate"] |= {"value": float("nan"), "n": 0}
    path.write_text(json.dumps(evaluation))
    write_csv(collect(runs, study).results, runs / "results.csv")
    line = next(
        line
        for line in (runs / "results.csv").read_text().splitlines()
        if ",aligned,refusal_rate," in line
    )
    assert ",refusal_rate,,0.9" in line and line.endswith(",0")


@pytest.mark.parametrize("name", ["evaluation.json", "card.json"])
def test_an_unfinished_stage_is_named(make_study, name, capsys):
    runs, study = make_study()
    missing = runs / "seed0/attack/booster/hard/p0.05" / name
    missing.unlink()
    with pytest.raises(TemperError, match="run the study again") as error:
        build_report(runs, study)
    assert str(missing) in str(error.value) and "\n" not in str(error.value)
    assert main([str(runs)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (runs / "report.html").exists()


def test_a_folder_that_is_no_study_is_refused(tmp_path):
    with pytest.raises(TemperError, match="study.yaml: missing"):
        Study.of_runs(tmp_path)


def test_a_headline_must_name_what_the_study_has(study_of):
    with pytest.raises(TemperError, match=r"headline.method: found 'boster'.*sft, booster"):
        Study.of(study_of(headline={"attack": "mild", "baseline": "sft", "method": "boster"}))


def test_a_missing_part_is_named(study_of):
    with pytest.raises(TemperError, match=r"seeds: found \[\]; accepted: at least one"):
        Study.of(study_of(seeds=[]))


def test_a_learning_rate_without_a_point_is_a_number(study_of):
    assert Study.of(study_of(attacks={"mild": {"lr": "5e-5"}})).learning_rates == {"mild": 5e-5}
