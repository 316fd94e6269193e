"""Studies on an existing model."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from temper.errors import TemperError
from temper.study import Study
from temper.study.stages import Stage, answers, evaluations, prepare_command

BASE = {
    "path": "models/some",
    "prepare": ["-m", "temper.proxy", "--model", "{model}", "--out", "{data}"],
    "config": [],
    "set": {},
}
PARTS: dict[str, Any] = {
    "name": "mine",
    "title": "Mine",
    "seeds": [1, 2],
    "align": {"set": {"trainer.max_steps": 3, "data.init_args.unsafe": "{data}/unsafe.jsonl"}},
    "objectives": {"sft": {"config": ["configs/objective/sft.yaml"]}},
    "attack": {"set": {"data.init_args.user": "{data}/task.jsonl", "data.init_args.n_rows": 100}},
    "attacks": {"mild": {"lr": 1e-4, "steps": 4}},
    "harmful_ratios": [0.3],
}


pytestmark = pytest.mark.usefixtures("with_models")


@pytest.fixture
def study(write_study) -> Study:
    return Study.load(write_study(None, **PARTS, base_model=BASE))


def settings(command: str) -> dict[str, str]:
    return dict(
        word[2:].split("=", 1)
        for word in shlex.split(command)
        if word.startswith("--") and "=" in word
    )


def test_the_projects_own_studies_on_a_real_model_load():
    for name in ("proxy", "proxy_smoke"):
        study = Study.load(f"studies/{name}.yaml")
        assert study.base_model.path == "models/smollm2-135m-instruct"


@pytest.mark.parametrize("name", ["proxy", "proxy_smoke"])
def test_every_stage_on_a_real_model_measures_the_user_s_task(name: str):
    """FA before the attack too: without it nobody can tell what the attack taught."""
    study = Study.load(f"studies/{name}.yaml")
    task = "r/data/test_task.jsonl"
    for stage in (*every_stage(study), Stage(study, "r", 1, "base")):
        assert settings(stage.answer_command)["data.init_args.task"] == task, stage.place


def test_every_datamodule_of_the_proxy_study_takes_the_task(command_line, capsys, tmp_path: Path):
    study = Study.load("studies/proxy.yaml")
    for objective in study.objectives:
        stage = Stage(study, str(tmp_path), 1, f"align/{objective}")
        for command in (stage.fit_command, stage.answer_command):
            with pytest.raises(SystemExit) as left:
                command_line(*shlex.split(command)[2:], "--print_config")
            printed = capsys.readouterr()
            assert left.value.code in (0, None), printed.err
            config = yaml.safe_load(printed.out)
            task = config["data"]["init_args"]["task"]
            assert task == f"{tmp_path}/data/test_task.jsonl", objective
            is_fit = " fit " in command
            network = config["model"]["init_args"]["network"]
            assert (network["lora"] is not None) is is_fit, "an export has its adapter"
            assert network["dtype"] == "bfloat16"


def every_stage(study: Study) -> list[Stage]:
    """An alignment and an attack of every objective."""
    attack = next(iter(study.attacks))
    return [
        Stage(study, "r", 1, place)
        for objective in study.objectives
        for place in (f"align/{objective}", f"attack/{objective}/{attack}/p0.3")
    ]


def test_files_are_made_from_the_model_and_stages_read_them(study: Study):
    words = shlex.split(prepare_command(study.base_model, "runs/mine/data"))
    command = ["-m", "temper.proxy", "--model", "models/some", "--out", "runs/mine/data"]
    assert words == [sys.executable, *command]
    align = settings(Stage(study, "runs/mine", 1, "align/sft").fit_command)
    assert align["data.init_args.unsafe"] == "runs/mine/data/unsafe.jsonl"
    assert align["model.init_args.network.path"] == "models/some"
    attack = settings(Stage(study, "runs/mine", 1, "attack/sft/mild/p0.3").fit_command)
    assert attack["data.init_args.user"] == "runs/mine/data/task.jsonl"


def test_the_base_model_answers_once_and_is_trained_never(study: Study):
    base = Stage(study, "runs/mine", 1, "base")
    command = shlex.split(base.answer_command)
    assert command[2] == "predict"
    assert settings(base.answer_command)["model.init_args.network.path"] == "models/some"
    assert not base.trained and base.answers_from == []
    asked = [path for seed in (1, 2) for path in answers(study, "runs/mine", seed)]
    assert asked.count("runs/mine/base/answers.jsonl") == 1
    assert not any("instruct" in path or "pretrain" in path for path in asked)
    assert len(asked) == len(evaluations(study, "runs/mine")) == 1 + 2 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give either pretrain and instruct"),
        ({"base_model": BASE, "pretrain": {}, "instruct": {}}, "give either pretrain and instruct"),
        ({"base_model": BASE, "pretrain": {}}, "give either pretrain and instruct"),
        ({"base_model": {"set": {}}}, "base_model.path: missing"),
        (
            {"base_model": BASE | {"prepare": "temper.proxy"}},
            "base_model.prepare: found 'temper.proxy'; accepted: a valid list",
        ),
        ({"base_model": BASE | {"folder": "x"}}, "base_model.folder: unknown key"),
        (
            {"base_model": BASE | {"path": "models/none"}},
            "base_model.path: found models/none, no such folder; .*make smollm2",
        ),
        (
            {"base_model": BASE | {"path": "configs/none"}},
            "base_model.path: found configs/none, no such folder",
        ),
        (
            {"base_model": BASE | {"path": "./models/none"}},
            "base_model.path: found ./models/none, no such folder",
        ),
        (
            {"base_model": BASE | {"path": "/nowhere"}},
            "base_model.path: found /nowhere, no such folder",
        ),
        ({"base_model": BASE | {"path": "none"}}, "base_model.path: found none, no such folder"),
    ],
)
def test_mistakes_are_named(write_study, changes: dict[str, Any], message: str):
    with pytest.raises(TemperError, match=message) as mistake:
        Study.load(write_study(None, **PARTS, **changes))
    assert "\n" not in str(mistake.value)


def test_a_model_folder_is_no_hub_organisation(write_study, with_models: Path):
    shutil.rmtree(with_models / "models")
    with pytest.raises(TemperError, match="base_model.path: found models/some, no such folder"):
        Study.load(write_study(None, **PARTS, base_model=BASE))


def test_a_hub_name_may_be_somewhere_else(write_study):
    base = BASE | {"path": "meta-llama/Llama-3.1-8B"}
    study = Study.load(write_study(None, **PARTS, base_model=base))
    assert study.base_model.path == "meta-llama/Llama-3.1-8B"
