"""The examples of CONTRIBUTING.md, and of the pages that go on from it, run as a reader would."""

import ast
import copy
import importlib
import re
import sys
import tomllib
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


def page_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)


def code_of(text: str) -> str:
    """A file's code, without docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            del node.body[0]
    return ast.dump(tree)


@pytest.mark.parametrize(
    ("page", "title"),
    [("add-objective.md", "Add an objective"), ("add-callback.md", "Add a callback")],
)
def test_the_page_has_the_example_that_is_run_here(page, title):
    assert code_of(page_blocks(page, "python")[0]) == code_of(block(title))


def test_a_package_adds_its_callback_to_every_trainer(tmp_path, monkeypatch):
    import lightning.pytorch as L

    distance, package = page_blocks("add-callback.md", "python")
    (project,) = map(tomllib.loads, page_blocks("add-callback.md", "toml"))
    (tmp_path / "weight_distance.py").write_text(distance)
    (tmp_path / "my_probes.py").write_text(package)
    info = tmp_path / "my_probes-0.1.dist-info"  # as pip would leave it
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-probes\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
            for group, points in project["project"]["entry-points"].items()
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("WEIGHT_DISTANCE_EVERY", "7")
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    (added,) = [one for one in trainer.callbacks if type(one).__name__ == "WeightDistance"]
    assert added.every_n_steps == 7
    for name in ("weight_distance", "my_probes"):
        sys.modules.pop(name)
