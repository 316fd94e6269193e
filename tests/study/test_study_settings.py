"""A study's YAML: every mistake that can be seen without running is refused."""

import re

import pytest
import yaml

from temper.errors import TemperError
from temper.study import Study

OBJECTIVE = {"config": ["configs/objective/sft.yaml"]}


def _refusal(path) -> str:
    with pytest.raises(TemperError) as mistake:
        Study.load(path)
    message = str(mistake.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.usefixtures("with_models")
def test_every_study_of_the_project_is_in_order(project_root):
    for path in (project_root / "studies").glob("*.yaml"):
        assert Study.load(path).name == path.stem


def test_a_missing_study_is_named(tmp_path):
    assert "no such file" in _refusal(tmp_path / "none.yaml")


def test_a_file_that_is_not_yaml_is_refused(tmp_path):
    (tmp_path / "study.yaml").write_text("seeds: [0\n")
    assert "not YAML" in _refusal(tmp_path / "study.yaml")


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "study.yaml").write_text("- seeds\n")
    assert "found list" in _refusal(tmp_path / "study.yaml")


@pytest.mark.parametrize(
    ("keys", "wrong", "meant"),
    [
        ({"seed": [0]}, "seed", "'seeds'"),
        ({"harmful_ratio": [0]}, "harmful_ratio", "'harmful_ratios'"),
        ({"align": {"sett": {}}}, "align.sett", "'set'"),
        ({"attacks": {"mild": {"lrr": 1, "lr": 1, "steps": 2}}}, "attacks.mild.lrr", "'lr'"),
        ({"objectives": {"sft": {"lable": "SFT"}}}, "objectives.sft.lable", "'label'"),
    ],
)
def test_an_unknown_key_gets_a_suggestion(write_study, keys, wrong, meant):
    message = _refusal(write_study(**keys))
    assert f" {wrong}: unknown key" in message and f"did you mean {meant}?" in message


@pytest.mark.parametrize(
    "key", ["name", "seeds", "objectives", "attack", "attacks", "harmful_ratios"]
)
def test_a_missing_key_is_named(write_study, project_root, key):
    content = yaml.safe_load((project_root / "studies" / "demo.yaml").read_text())
    assert f": {key}: missing" in _refusal(write_study(**content | {"base": None, key: None}))


def test_a_part_that_is_no_mapping_is_refused(write_study):
    message = _refusal(write_study(objectives={"sft": "SFT"}))
    assert "objectives.sft: found 'SFT'; accepted: a mapping with keys of config" in message


@pytest.mark.parametrize("part", ["align", "objectives"])
def test_a_config_file_that_does_not_exist_is_named(write_study, part):
    missing = {"config": ["configs/none.yaml"]}
    objectives = {"booster": OBJECTIVE, "sft": missing}
    message = _refusal(write_study(**{part: missing if part == "align" else objectives}))
    assert "configs/none.yaml" in message and part in message and "does not exist" in message


@pytest.mark.parametrize(
    "trainer", ["configs/trainer/none.yaml", "configs/trainer", ["configs/trainer/cpu.yaml"]]
)
def test_a_trainer_that_is_no_file_is_named(write_study, trainer):
    message = _refusal(write_study(trainer=trainer))
    assert f"trainer: found {trainer}" in message
    assert ("a valid string" if isinstance(trainer, list) else "does not exist") in message


@pytest.mark.parametrize("shown", [-1, "two", 1.5, True])
def test_answers_to_show_are_a_number_of_them(write_study, shown):
    message = _refusal(write_study(show_answers=shown))
    assert f"show_answers: found {shown!r}" in message
    assert "a valid integer" in message or "greater than or equal to 0" in message
    assert Study.load(write_study(show_answers=0)).show_answers == 0


@pytest.mark.parametrize("missing", ["lr", "steps"])
def test_an_attack_needs_its_rate_and_its_steps(write_study, missing):
    attack = {"lr": 1e-4, "steps": 10}
    del attack[missing]
    headline = {"attack": "weak", "baseline": "sft", "method": "booster"}
    message = _refusal(write_study(attacks={"weak": attack}, headline=headline))
    assert f"attacks.weak.{missing}: missing" in message and "needs lr and steps" in message


def test_a_study_needs_a_seed(write_study):
    assert "seeds: found []; accepted: at least one" in _refusal(write_study(seeds=[]))


def test_a_study_needs_a_ratio(write_study):
    message = _refusal(write_study(harmful_ratios=[]))
    assert "harmful_ratios: found []; accepted: at least one" in message


@pytest.mark.parametrize(
    ("threads", "found"),
    [({"alin": 2}, "threads.alin: found 'alin'; accepted: 'base_model', "), ({"align": 0}, "0")],
)
def test_threads_are_those_of_a_stage(write_study, threads, found):
    assert found in _refusal(write_study(threads=threads))


def test_attacked_weights_are_kept_where_the_study_says_so(write_study):
    assert not Study.load(write_study()).keep_attacked
    assert Study.load(write_study(keep_attacked=True)).keep_attacked
    message = _refusal(write_study(keep_attacked="yes, please"))
    assert "keep_attacked: found 'yes, please'; accepted: a valid boolean" in message


@pytest.mark.parametrize(
    ("ratio", "found"), [(0.015, "not a whole number"), (1.5, "[0, 1]"), (-0.1, "[0, 1]")]
)
def test_a_ratio_that_the_rows_cannot_have_is_refused(write_study, ratio, found):
    with pytest.raises(TemperError, match=re.escape(found)) as mistake:
        Study.load(write_study(harmful_ratios=[0, ratio]))
    assert f"{ratio}" in str(mistake.value)


@pytest.mark.parametrize("key", ["attack", "baseline", "method"])
def test_a_headline_that_names_nothing_of_the_study_is_refused(write_study, key):
    headline = {"attack": "mild", "baseline": "sft", "method": "booster"} | {key: "other"}
    message = _refusal(write_study(headline=headline))
    assert (
        f"headline.{key}: found 'other'" in message
        and ("mild" if key == "attack" else "booster") in message
    )


def test_a_missing_base_is_named(write_study, tmp_path):
    with pytest.raises(TemperError, match=re.escape(f"{tmp_path / 'none.yaml'}: no such file")):
        Study.load(write_study(base="none.yaml"))


def test_own_keys_replace_and_settings_are_merged(write_study):
    base = Study.load("studies/ci.yaml").as_yaml()
    own = Study.load(
        write_study(
            seeds=[3],
            align={"set": {"trainer.max_steps": 7}},
            objectives={"sft": OBJECTIVE},
            headline={"attack": "mild", "baseline": "sft", "method": "sft"},
        )
    ).as_yaml()
    assert own["seeds"] == [3] and list(own["objectives"]) == ["sft"]
    assert own["align"]["set"] == base["align"]["set"] | {"trainer.max_steps": 7}
    assert own["align"]["config"] == base["align"]["config"]
    assert {key: own[key] for key in ("pretrain", "instruct", "attack", "attacks")} == {
        key: base[key] for key in ("pretrain", "instruct", "attack", "attacks")
    }
    assert "base" not in own


def test_a_base_is_looked_for_beside_the_study(write_study):
    write_study(file="first.yaml", seeds=[1, 2])
    assert Study.load(write_study(base="first.yaml", name="second")).seeds == (1, 2)


def test_a_study_folder_is_read_without_its_configs(tmp_path, monkeypatch):
    study = Study.load("studies/ci.yaml")
    (tmp_path / "study.yaml").write_text(study.as_text())
    monkeypatch.chdir(tmp_path)  # no configs here
    again = Study.of_runs(tmp_path)
    assert again.as_yaml() == study.as_yaml() and again.routes == study.routes
    assert (again.title, again.objectives["sft"]) == ("The main job, shortened", "SFT")
    assert (again.ratios, again.counted_ratios, again.seeds) == ((0.0, 0.2), (0.2,), (0,))
    assert again.learning_rates == {"mild": 3e-4} and again.steps == {"mild": 60}
    assert (again.contest.attack, again.base_given) == ("mild", False)
