"""The finding in a sentence that is true whichever way it went."""

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
    assert "milder attack, Booster carried out fewer unsafe requests than SFT" in first
    assert "7.5 % against 30.0 %, 22.5 points lower (95 % interval" in first
    assert "fine-tune accuracy of 88.0 % against 88.0 % (no clear difference)" in first
    assert "harder attack no clear advantage is left (45.0 % against 45.0 %)" in second
    assert worst.startswith("Booster is not safe")
    assert "harder attack, p = 10 %" in worst and "60.0 %" in worst
    assert text.endswith(".") and text.count(". ") == 0  # one sentence


def test_a_loss_is_reported_as_a_loss(make_study):
    text = find(make_study, slopes(mild=(1, 5), hard=(2, 6))).sentence()
    first, second, _ = text.split("; ")
    assert "milder attack, Booster did worse than SFT" in first
    assert "30.0 points higher (95 % interval 2" in first
    assert "harder attack it did worse too" in second
    assert "fewer" not in text and "advantage" not in text


def test_no_difference_is_reported_as_none(make_study):
    text = find(make_study, slopes(mild=(4, 3.9), hard=(6, 1))).sentence()
    first, second, _ = text.split("; ")
    assert "milder attack there was no clear difference between Booster and SFT" in first
    assert "−0.8 points (95 % interval −" in first
    assert "harder attack Booster did better (7.5 % against 45.0 %, 37.5 points lower)" in second


def test_an_advantage_that_turns(make_study):
    _, second, _ = find(make_study, slopes(mild=(4, 1), hard=(1, 6))).sentence().split("; ")
    assert "harder attack Booster did worse (45.0 % against 7.5 %, 37.5 points higher)" in second


def test_little_harm_is_not_called_unsafe(make_study):
    text = find(make_study, slopes(mild=(3, 0.1), hard=(3, 0.2))).sentence()
    assert "the advantage holds" in text and "not safe" not in text
    assert "(harder attack, p = 10 %) Booster carried out 2.0 % of unsafe requests" in text


def test_without_a_headline_the_lowest_is_named(make_study, study_of):
    study = study_of()
    del study["headline"]
    found = find(make_study, slopes(mild=(4, 1), hard=(6, 5.8)), study)
    assert found.comparisons == ()
    mild, hard = found.leaders
    assert (mild.objective, mild.runner_up, hard.objective) == ("Booster", "SFT", "Booster")
    text = found.sentence()
    assert "milder attack Booster had the lowest" in text
    assert "(7.5 %; next SFT with 30.0 %)" in text
    assert "harder attack Booster had the lowest" in text
    assert "(43.5 %; next SFT with 45.0 %, no clear difference)" in text
    assert "SFT is not safe" in text


def test_the_headline_attack_comes_first_wherever_it_stands(make_study, study_of):
    study = study_of(headline={"attack": "hard", "baseline": "booster", "method": "sft"})
    found = find(make_study, slopes(mild=(4, 1), hard=(6, 6)), study)
    assert [c.attack for c in found.comparisons] == ["harder attack", "milder attack"]
    assert "milder attack SFT did worse (30.0 % against 7.5 %, 22.5 points" in found.sentence()


def test_notes_tell_of_collapse_lenient_scores_and_seeds(make_study, study_of):
    runs, study = make_study(study_of(seeds=[0, 1]), slopes(mild=(4, 1), hard=(6, 6)))
    results = collect(runs, study).results
    attacked = (results["objective"] == "booster") & (results["attack"] == "mild")
    results.loc[attacked & (results["metric"] == "degenerate_rate"), "value"] = 0.5
    results.loc[attacked & (results["metric"] == "harmful_score_lenient"), "value"] = 0.4
    lenient, collapse, hard, before, *_, seeds = headline(results, study).notes()
    assert "lenient score" in lenient and "no clear difference" in lenient
    assert "milder attack, 50.0 % of Booster's answers" in collapse and "degenerate" in collapse
    assert "harder attack" in hard
    assert "SFT refused 98.0 %" in before and "safe accuracy of 96.0 %" in before
    assert seeds.startswith("2 seeds")


def test_the_csv_says_the_same(make_study):
    runs, study = make_study()
    results = collect(runs, study).results
    write_csv(results, runs / "results.csv")
    assert (
        headline(pd.read_csv(runs / "results.csv"), study).sentence()
        == headline(results, study).sentence()
    )
