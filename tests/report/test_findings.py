"""The finding in a sentence: better, worse, or no clear difference."""

import pandas as pd
import pytest

from temper.report.collect import collect, write_csv
from temper.report.findings import headline


def find(make_study, score, study=None):
    runs, study = make_study(study, score)
    return headline(collect(runs, study).results, study)


def slopes(**per_attack):
    """Scores that grow with p; (SFT's slope, Booster's slope) per attack."""
    return lambda objective, attack, ratio, seed: per_attack[attack][objective == "booster"] * ratio


def check_says(text: str, *words: str) -> None:
    """Names, numbers and directions must be in a text, in any wording."""
    for word in words:
        assert word in text, word


def test_better_then_lost_under_the_harder_attack(make_study):
    found = find(make_study, slopes(mild=(4, 1), hard=(6, 6)))
    mild, hard = found.comparisons
    assert (mild.attack, mild.reduction.clear, hard.reduction.clear) == ("milder attack", 1, 0)
    assert mild.baseline.value == pytest.approx(0.3)  # p = 0 is not part of the mean
    assert mild.method.value == pytest.approx(0.075)
    assert mild.reduction.value == pytest.approx(0.225)
    assert mild.reduction.low < 0.225 < mild.reduction.high
    text = found.sentence()
    first, second, worst = text.split("; ")
    check_says(first, "milder attack", "Booster", "fewer", "SFT")
    check_says(first, "7.5 % against 30.0 %", "22.5 points lower", "95 % interval")
    check_says(first, "88.0 % against 88.0 %", "no clear difference")
    check_says(second, "harder attack", "no clear advantage", "45.0 % against 45.0 %")
    check_says(worst, "Booster is not safe", "harder attack, p = 10 %", "60.0 %")
    assert text.endswith(".") and text.count(". ") == 0  # one sentence


def test_a_loss_is_reported_as_a_loss(make_study):
    text = find(make_study, slopes(mild=(1, 5), hard=(2, 6))).sentence()
    first, second, _ = text.split("; ")
    check_says(first, "milder attack", "Booster did worse", "SFT")
    check_says(first, "30.0 points higher", "95 % interval 2")
    check_says(second, "harder attack", "worse too")
    assert "fewer" not in text and "advantage" not in text


def test_no_difference_is_reported_as_none(make_study):
    text = find(make_study, slopes(mild=(4, 3.9), hard=(6, 1))).sentence()
    first, second, _ = text.split("; ")
    check_says(first, "milder attack", "no clear difference", "Booster", "SFT")
    check_says(first, "−0.8 points", "95 % interval −")
    check_says(second, "harder attack", "Booster did better")
    check_says(second, "7.5 % against 45.0 %", "37.5 points lower")


def test_an_advantage_that_turns(make_study):
    _, second, _ = find(make_study, slopes(mild=(4, 1), hard=(1, 6))).sentence().split("; ")
    check_says(second, "harder attack", "Booster did worse")
    check_says(second, "45.0 % against 7.5 %", "37.5 points higher")


def test_little_harm_is_not_called_unsafe(make_study):
    text = find(make_study, slopes(mild=(3, 0.1), hard=(3, 0.2))).sentence()
    assert "not safe" not in text
    check_says(text, "advantage holds", "harder attack, p = 10 %", "Booster", "2.0 % of unsafe")


def test_without_a_headline_the_lowest_is_named(make_study, study_of):
    study = study_of()
    del study["headline"]
    found = find(make_study, slopes(mild=(4, 1), hard=(6, 5.8)), study)
    assert found.comparisons == ()
    mild, hard = found.leaders
    assert (mild.objective, mild.runner_up, hard.objective) == ("Booster", "SFT", "Booster")
    text = found.sentence()
    check_says(text, "milder attack Booster had the lowest", "7.5 %; next SFT with 30.0 %")
    check_says(text, "harder attack Booster had the lowest", "43.5 %; next SFT with 45.0 %")
    check_says(text, "no clear difference", "SFT is not safe")


def test_the_headline_attack_comes_first_wherever_it_stands(make_study, study_of):
    study = study_of(headline={"attack": "hard", "baseline": "booster", "method": "sft"})
    found = find(make_study, slopes(mild=(4, 1), hard=(6, 6)), study)
    assert [c.attack for c in found.comparisons] == ["harder attack", "milder attack"]
    check_says(
        found.sentence(), "milder attack SFT did worse", "30.0 % against 7.5 %", "22.5 points"
    )


def test_notes_tell_of_collapse_lenient_scores_and_seeds(make_study, study_of):
    runs, study = make_study(study_of(seeds=[0, 1]), slopes(mild=(4, 1), hard=(6, 6)))
    results = collect(runs, study).results
    attacked = (results["objective"] == "booster") & (results["attack"] == "mild")
    results.loc[attacked & (results["metric"] == "degenerate_rate"), "value"] = 0.5
    results.loc[attacked & (results["metric"] == "harmful_score_lenient"), "value"] = 0.4
    lenient, collapse, hard, before, *_, seeds = headline(results, study).notes()
    check_says(lenient, "lenient score", "no clear difference")
    check_says(collapse, "milder attack", "50.0 %", "Booster", "degenerate")
    check_says(hard, "harder attack")
    check_says(before, "SFT", "98.0 %", "safe accuracy", "96.0 %")
    assert seeds.startswith("2 seeds")


def test_the_csv_says_the_same(make_study):
    runs, study = make_study()
    results = collect(runs, study).results
    write_csv(results, runs / "results.csv")
    assert (
        headline(pd.read_csv(runs / "results.csv"), study).sentence()
        == headline(results, study).sentence()
    )
