"""What each stage runs, and what makes it run again."""

import ast
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from temper.cli.main import PACKAGES
from temper.study import code_hash, fit_command, load_study, report_inputs, stage_folder
from temper.study.stages import TRAINING_CODE


@pytest.fixture
def study(project_root) -> dict:
    return load_study("studies/ci.yaml")


def _read(command: str) -> tuple[list[str], list[str], dict[str, str]]:
    """(first words, config files, settings) of a command."""
    words = shlex.split(command)
    configs = [words[i + 1] for i, word in enumerate(words) if word == "--config"]
    pairs = [word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word]
    assert len(dict(pairs)) == len(pairs), "a setting is given twice"
    assert len(words) == 3 + 2 * len(configs) + len(pairs)
    return words[:3], configs, dict(pairs)


def test_the_first_stage_builds_a_network_of_the_seed(study):
    first, configs, settings = _read(fit_command(study, "runs/x", "3", "pretrain"))
    assert first == [sys.executable, "train.py", "fit"]
    assert configs == ["configs/trainer/cpu.yaml", *study["pretrain"]["config"]]
    assert (
        settings["model.init_args.network.shape.seed"]
        == settings["seed_everything"]
        == settings["data.init_args.seed"]
        == "3"
    )
    assert "model.init_args.network.path" not in settings


@pytest.mark.parametrize("kind", ["instruct", "align", "attack"])
def test_a_later_stage_starts_from_the_model_it_is_given(study, kind):
    names = {"objective": "booster", "attack": "mild", "ratio": "0.2"}
    _, _, settings = _read(fit_command(study, "runs/x", "0", kind, "runs/before/export", **names))
    assert settings["model.init_args.network.path"] == "runs/before/export"
    assert not any("shape" in key for key in settings)


def test_an_alignment_adds_what_its_objective_says(study):
    study["objectives"]["booster"]["set"] = {"model.init_args.lam": 5, "trainer.max_steps": 9}
    _, configs, settings = _read(
        fit_command(study, "runs/x", "0", "align", "m", objective="booster")
    )
    assert configs[-1] == "configs/objective/booster.yaml"
    assert settings["model.init_args.lam"] == "5"
    assert settings["trainer.max_steps"] == settings["trainer.val_check_interval"] == "9"
    assert (
        "model.init_args.lam"
        not in _read(fit_command(study, "runs/x", "0", "align", "m", objective="sft"))[2]
    )


def test_an_attack_has_its_rate_steps_and_ratio(study):
    _, _, settings = _read(
        fit_command(
            study, "runs/x", "0", "attack", "m", objective="sft", attack="mild", ratio="0.2"
        )
    )
    assert (
        float(settings["model.init_args.optimizer.init_args.lr"]) == study["attacks"]["mild"]["lr"]
    )
    assert int(settings["trainer.max_steps"]) == study["attacks"]["mild"]["steps"]
    assert settings["data.init_args.harmful_ratio"] == "0.2"


@pytest.mark.parametrize("kind", ["pretrain", "instruct", "align", "attack"])
def test_every_stage_evaluates_after_its_last_step_into_its_own_folder(study, kind):
    names = {"objective": "sft", "attack": "mild", "ratio": "0"}
    _, _, settings = _read(fit_command(study, "runs/its own", "0", kind, **names))
    assert settings["trainer.val_check_interval"] == settings["trainer.max_steps"]
    assert settings["trainer.default_root_dir"] == "runs/its own"


def test_a_command_is_written_as_yaml_reads_it(study):
    study["instruct"]["set"] |= {"data.init_args.language": None, "trainer.deterministic": True}
    _, _, settings = _read(fit_command(study, "runs/x", "0", "instruct", "m"))
    assert (settings["data.init_args.language"], settings["trainer.deterministic"]) == (
        "null",
        "true",
    )


@pytest.mark.parametrize("kind", ["pretrain", "instruct", "align", "attack"])
def test_the_command_line_takes_the_command_of_every_stage(
    study, kind, command_line, capsys, tmp_path
):
    command = fit_command(
        study,
        str(tmp_path),
        "0",
        kind,
        None if kind == "pretrain" else "m",
        objective="booster",
        attack="mild",
        ratio="0",
    )
    with pytest.raises(SystemExit) as left:
        command_line(*shlex.split(command)[2:], "--print_config")
    assert left.value.code in (0, None), capsys.readouterr().err


def test_the_report_reads_every_stage_of_every_seed(study):
    study |= {"seeds": [0, 1], "harmful_ratios": [0, 0.05]}
    inputs = report_inputs(study, "runs/ci")
    assert len(inputs) == len(set(inputs)) == 2 * (1 + 2 + 2 * 1 * 2)
    assert stage_folder("runs/ci", "1", "attack/booster/mild/p0.05") + "/evaluation.json" in inputs
    assert stage_folder("runs/ci", "0", "instruct") + "/evaluation.json" in inputs


@pytest.fixture
def tree(project_root, tmp_path, monkeypatch) -> Path:
    """A copy of the project's code, in which a test may change anything."""
    for place in (*TRAINING_CODE, "temper/report", "temper/study", "studies", "tests/study"):
        source, target = project_root / place, tmp_path / place
        target.parent.mkdir(parents=True, exist_ok=True)
        (
            shutil.copytree(source, target, dirs_exist_ok=True)
            if source.is_dir()
            else shutil.copy(source, target)
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("place", TRAINING_CODE)
def test_a_change_of_any_training_code_changes_the_hash(tree, place):
    before = code_hash()
    path = (
        tree / place
        if (tree / place).is_file()
        else next((tree / place).rglob("*.yaml" if place == "configs" else "*.py"))
    )
    path.write_text(path.read_text() + "\n# changed\n")
    assert code_hash() != before


def test_a_new_or_renamed_file_changes_the_hash(tree):
    hashes = [code_hash()]
    (tree / "callbacks" / "new.py").write_text("")
    hashes.append(code_hash())
    (tree / "callbacks" / "new.py").rename(tree / "callbacks" / "newer.py")
    hashes.append(code_hash())
    assert len(set(hashes)) == 3


@pytest.mark.parametrize(
    "place",
    [
        "temper/report/table.py",
        "temper/report/style.css",
        "temper/study/progress.py",
        "studies/ci.yaml",
        "tests/study/x.py",
    ],
)
def test_a_change_of_the_report_or_of_a_test_does_not_change_the_hash(tree, place):
    before = code_hash()
    with open(tree / place, "a") as file:
        file.write("\n# changed\n")
    assert code_hash() == before


def test_compiled_files_do_not_change_the_hash(tree):
    before = code_hash()
    (tree / "callbacks" / "__pycache__").mkdir(exist_ok=True)
    (tree / "callbacks" / "__pycache__" / "x.cpython-311.pyc").write_bytes(b"x")
    assert code_hash() == before


def test_every_module_that_a_fit_imports_is_hashed(project_root):
    """Follow the imports from train.py and from the packages that the command line imports by name;
    what is not hashed must be one of a few that no metric depends on.
    """
    harmless = {
        "temper/__init__.py",
        "temper/errors.py",
        "temper/run_folder.py",
        "temper/packages.py",
    }
    seen: set[str] = set()
    todo = ["train.py", *(f"{package}/__init__.py" for package in PACKAGES)]
    while todo:
        file = todo.pop()
        if file in seen:
            continue
        seen.add(file)
        for node in ast.walk(ast.parse((project_root / file).read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            for name in names:
                stem = name.replace(".", "/")
                todo += [
                    found
                    for found in (f"{stem}.py", f"{stem}/__init__.py")
                    if (project_root / found).is_file()
                ]
    assert "temper/losses/tokens.py" in seen and "lightning_modules/booster.py" in seen
    hashed = {
        file
        for file in seen
        if any(file == place or file.startswith(f"{place}/") for place in TRAINING_CODE)
    }
    # A preview and a plan compute no figure.
    assert {
        file for file in seen - hashed if not file.startswith(("temper/preview/", "temper/plan/"))
    } <= harmless
