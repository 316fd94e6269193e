"""Studies on a model that there is."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from temper.errors import TemperError
from temper.study import fit_command, load_study, prepare_command, report_inputs

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
def study(write_study) -> dict[str, Any]:
    return load_study(write_study(None, **PARTS, base_model=BASE))


def settings(command: str) -> dict[str, str]:
    return dict(
        word[2:].split("=", 1)
        for word in shlex.split(command)
        if word.startswith("--") and "=" in word
    )


def test_the_projects_own_studies_on_a_real_model_load():
    for name in ("proxy", "proxy_smoke"):
        assert (
            load_study(f"studies/{name}.yaml")["base_model"]["path"]
            == "models/smollm2-135m-instruct"
        )


@pytest.mark.parametrize("name", ["proxy", "proxy_smoke"])
def test_every_stage_on_a_real_model_measures_the_user_s_task(name: str):
    """FA before the attack too: without it nobody can tell what the attack taught."""
    study, task = load_study(f"studies/{name}.yaml"), "D/test_task.jsonl"
    assert (
        settings(fit_command(study, "r", "1", "base_model", "m", data="D"))["data.init_args.task"]
        == task
    )
    for objective in study["objectives"]:
        names = {
            "objective": objective,
            "data": "D",
            "attack": next(iter(study["attacks"])),
            "ratio": "0.3",
        }
        for kind in ("align", "attack"):
            assert (
                settings(fit_command(study, "r", "1", kind, "m", **names))["data.init_args.task"]
                == task
            ), objective


def test_every_datamodule_of_the_proxy_study_takes_the_task(command_line, capsys, tmp_path: Path):
    study = load_study("studies/proxy.yaml")
    for objective in study["objectives"]:
        command = fit_command(
            study, str(tmp_path), "1", "align", "m", objective=objective, data=str(tmp_path)
        )
        with pytest.raises(SystemExit) as left:
            command_line(*shlex.split(command)[2:], "--print_config")
        printed = capsys.readouterr()
        assert left.value.code in (0, None), printed.err
        assert (
            yaml.safe_load(printed.out)["data"]["init_args"]["task"]
            == f"{tmp_path}/test_task.jsonl"
        ), objective


def test_files_are_made_from_the_model_and_stages_read_them(study: dict[str, Any]):
    words = shlex.split(prepare_command(study, "runs/mine/data"))
    assert words == [
        sys.executable,
        "-m",
        "temper.proxy",
        "--model",
        "models/some",
        "--out",
        "runs/mine/data",
    ]
    align = settings(
        fit_command(
            study,
            "runs/mine/a",
            "1",
            "align",
            "models/some",
            objective="sft",
            data="runs/mine/data",
        )
    )
    assert align["data.init_args.unsafe"] == "runs/mine/data/unsafe.jsonl"
    assert align["model.init_args.network.path"] == "models/some"
    names = {"objective": "sft", "attack": "mild", "ratio": "0.3", "data": "D"}
    assert (
        settings(fit_command(study, "runs/mine/a", "1", "attack", "e", **names))[
            "data.init_args.user"
        ]
        == "D/task.jsonl"
    )


def test_the_base_model_is_evaluated_once(study: dict[str, Any]):
    command = fit_command(study, "runs/mine/base", "1", "base_model", "models/some", data="D")
    assert (
        shlex.split(command)[2] == "validate"
        and settings(command)["model.init_args.network.path"] == "models/some"
    )
    inputs = report_inputs(study, "runs/mine")
    assert inputs.count("runs/mine/base/evaluation.json") == 1
    assert not any("instruct" in path or "pretrain" in path for path in inputs)
    assert len(inputs) == 1 + 2 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give either pretrain and instruct"),
        ({"base_model": BASE, "pretrain": {}, "instruct": {}}, "give either pretrain and instruct"),
        ({"base_model": BASE, "pretrain": {}}, "give either pretrain and instruct"),
        ({"base_model": {"set": {}}}, "base_model.path is None"),
        (
            {"base_model": BASE | {"prepare": "temper.proxy"}},
            "base_model.prepare is 'temper.proxy'",
        ),
        ({"base_model": BASE | {"folder": "x"}}, "unknown key base_model.folder"),
        (
            {"base_model": BASE | {"path": "models/none"}},
            "base_model.path=models/none: no such folder; .*make smollm2",
        ),
        (
            {"base_model": BASE | {"path": "configs/none"}},
            "base_model.path=configs/none: no such folder",
        ),
        (
            {"base_model": BASE | {"path": "./models/none"}},
            "base_model.path=./models/none: no such folder",
        ),
        ({"base_model": BASE | {"path": "/nowhere"}}, "base_model.path=/nowhere: no such folder"),
        ({"base_model": BASE | {"path": "none"}}, "base_model.path=none: no such folder"),
    ],
)
def test_mistakes_are_named(write_study, changes: dict[str, Any], message: str):
    with pytest.raises(TemperError, match=message) as mistake:
        load_study(write_study(None, **PARTS, **changes))
    assert "\n" not in str(mistake.value)


def test_where_there_is_no_folder_of_models_it_is_no_organisation(write_study, with_models: Path):
    shutil.rmtree(with_models / "models")
    with pytest.raises(TemperError, match="base_model.path=models/some: no such folder"):
        load_study(write_study(None, **PARTS, base_model=BASE))


def test_a_hub_name_may_be_somewhere_else(write_study):
    base = BASE | {"path": "meta-llama/Llama-3.1-8B"}
    assert (
        load_study(write_study(None, **PARTS, base_model=base))["base_model"]["path"]
        == "meta-llama/Llama-3.1-8B"
    )
