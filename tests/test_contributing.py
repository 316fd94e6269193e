"""The examples of CONTRIBUTING.md, run as a reader would."""

import copy
import importlib
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from tests.objectives import (
    fit,
    global_batches,
    make_data,
    make_module,
    norm,
    plain_gradient,
    trainable,
    trained_weights,
)

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
TITLES = {
    "sam_example": "Add an objective",
    "benign_example": "Add a datamodule",
    "distance_example": "Add a callback",
    "keyword_example": "Add a judge",
}


def block(title: str, language: str = "python") -> str:
    """The first code block under a heading."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M)
    assert section, f"CONTRIBUTING.md has no section {title!r}"
    code = re.search(rf"```{language}\n(.*?)```", section[1], re.S)
    assert code, f"no {language} example under {title!r}"
    return code[1]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Import an example as a file of its own, as it would be in a user's package."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def load(name: str) -> ModuleType:
        (tmp_path / f"{name}.py").write_text(block(TITLES[name]))
        importlib.invalidate_caches()
        return importlib.import_module(name)

    yield load
    for name in TITLES:
        sys.modules.pop(name, None)


def test_the_objective_has_the_gradient_that_its_docstring_says(example):
    module = make_module(
        example("sam_example").SAMModule,
        rho=0.05,
        max_grad_norm=None,
        optimizer=partial(torch.optim.SGD, lr=1.0),
    )
    network = copy.deepcopy(module.network)
    start = trained_weights(network)
    fit(module, make_data(), 1)
    rows = global_batches(make_data(), 1)[0]["alignment"]
    ascent = plain_gradient(network, rows)
    with torch.no_grad():
        for parameter, g in zip(trainable(network), ascent, strict=True):
            parameter += 0.05 * g / norm(ascent)
    expected = plain_gradient(network, rows)
    for before, after, gradient in zip(start, trainable(module.network), expected, strict=True):
        torch.testing.assert_close(before - after, gradient, rtol=1e-9, atol=1e-12)


def test_examples_of_all_three_kinds_run_from_the_command_line(example, command_line, tmp_path):
    for name in ("sam_example", "benign_example", "distance_example"):
        example(name)
    common = [
        "--config=configs/trainer/cpu.yaml",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        "--trainer.log_every_n_steps=1",
    ]
    command_line(
        "fit",
        *common,
        "--config=configs/data/alignment.yaml",
        "--data.init_args.preset=tiny",
        "--data.init_args.n_alignment=20",
        "--data.init_args.n_harmful=10",
        "--data.init_args.batch_size=4",
        "--data.init_args.harmful_batch_size=4",
        "--data.init_args.n_eval=4",
        "--model=sam_example.SAMModule",
        "--model.init_args.rho=0.02",
        "--model.init_args.network.shape.hidden_size=16",
        "--model.init_args.network.shape.n_heads=2",
        "--trainer.callbacks+=distance_example.WeightDistance",
        "--trainer.callbacks.every_n_steps=1",
        f"--trainer.default_root_dir={tmp_path / 'sam'}",
    )
    assert "distance/from_start" in (tmp_path / "sam" / "metrics.csv").read_text()
    assert (tmp_path / "sam" / "export" / "config.json").exists()
    command_line(
        "fit",
        *common,
        "--config=configs/objective/sft.yaml",
        "--data=benign_example.SyntheticBenign",
        "--data.init_args.preset=tiny",
        "--data.init_args.n_eval=4",
        "--data.init_args.batch_size=4",
        f"--model.init_args.network.path={tmp_path / 'sam' / 'export'}",
        f"--trainer.default_root_dir={tmp_path / 'benign'}",
    )
    assert (tmp_path / "benign" / "evaluation.json").exists()


def test_a_bad_rho_is_refused(example):
    with pytest.raises(Exception, match=r"model.init_args.rho=-1.0: give a number >= 0"):
        make_module(example("sam_example").SAMModule, rho=-1.0)


def test_the_judge_tells_refusals_from_answers(example):
    judge = example("keyword_example").RefusalWords()
    refused, answered, empty = judge(["q"] * 3, ["I cannot help with that.", "Here you are.", "  "])
    assert (refused.label, answered.label, empty.label) == ("safe", "harmful", "safe")
    assert empty.degenerate and not answered.refused


def test_the_study_loads(tmp_path, monkeypatch):
    from temper.study import Study

    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(block("Add a study", "yaml"))
    content["base"] = str(ROOT / "studies" / content["base"])
    path = tmp_path / "long_alignment.yaml"
    path.write_text(yaml.safe_dump(content))
    assert set(Study.load(path).objectives) == {"short", "long"}
