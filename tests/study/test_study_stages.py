"""What each stage runs, and what makes it run again."""

import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from temper.study import Study
from temper.study.stages import (
    Stage,
    evaluated,
    evaluations,
    judge_code,
    report_hash,
    report_inputs,
    stage_at,
)

FITS = ("pretrain", "instruct", "align/booster", "attack/booster/mild/p0.2")


@pytest.fixture
def study(project_root) -> Study:
    return Study.load("studies/ci.yaml")


def _read(command: str) -> tuple[list[str], list[str], dict[str, str]]:
    """(first words, config files, settings) of a command."""
    words = shlex.split(command)
    configs = [words[i + 1] for i, word in enumerate(words) if word == "--config"]
    pairs = [word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word]
    assert len(dict(pairs)) == len(pairs), "a setting is given twice"
    assert len(words) == 3 + 2 * len(configs) + len(pairs)
    return words[:3], configs, dict(pairs)


def _fit(study: Study, place: str, seed: int = 0, runs: str = "runs/x"):
    return _read(Stage(study, runs, seed, place).fit_command)


def _answer(study: Study, place: str):
    return _read(Stage(study, "runs/x", 0, place).answer_command)


# -- commands


def test_the_first_stage_builds_a_network_of_the_seed(study):
    first, configs, settings = _fit(study, "pretrain", seed=3)
    assert first == [sys.executable, "train.py", "fit"]
    assert configs == ["configs/trainer/cpu.yaml", *study.pretrain.config]
    seeds = ("model.init_args.network.shape.seed", "seed_everything", "data.init_args.seed")
    assert {settings[seed] for seed in seeds} == {"3"}
    assert "model.init_args.network.path" not in settings


@pytest.mark.parametrize(
    ("place", "before"),
    [
        ("instruct", "pretrain"),
        ("align/booster", "instruct"),
        ("attack/booster/mild/p0.2", "align/booster"),
    ],
)
def test_a_later_stage_starts_from_the_model_of_the_one_before(study, place, before):
    _, _, settings = _fit(study, place)
    assert settings["model.init_args.network.path"] == f"runs/x/seed0/{before}/export"
    assert not any("shape" in key for key in settings)
    assert Stage(study, "runs/x", 0, place).inputs == [f"runs/x/seed0/{before}/export"]


def test_an_alignment_adds_what_its_objective_says(study):
    study.objective_parts["booster"].settings |= {
        "model.init_args.lam": 5,
        "trainer.max_steps": 9,
    }
    _, configs, settings = _fit(study, "align/booster")
    assert configs[-1] == "configs/objective/held_booster.yaml"
    assert settings["model.init_args.lam"] == "5"
    assert settings["trainer.max_steps"] == settings["trainer.val_check_interval"] == "9"
    assert "model.init_args.lam" not in _fit(study, "align/sft")[2]


def test_an_attack_has_its_rate_steps_and_ratio(study):
    _, _, settings = _fit(study, "attack/sft/mild/p0.2")
    attack = study.attack_parts["mild"]
    assert float(settings["model.init_args.optimizer.init_args.lr"]) == attack.lr
    assert int(settings["trainer.max_steps"]) == attack.steps
    assert settings["data.init_args.harmful_ratio"] == "0.2"


@pytest.mark.parametrize("place", FITS)
def test_a_fit_evaluates_nothing_and_writes_into_its_own_folder(study, place):
    _, _, settings = _fit(study, place, runs="runs/its own")
    assert settings["trainer.limit_val_batches"] == "0"
    assert settings["trainer.default_root_dir"] == f"runs/its own/seed0/{place}"


@pytest.mark.parametrize("place", FITS[1:])
def test_answers_are_of_the_export_to_the_stages_prompts(study, place):
    first, _, settings = _answer(study, place)
    assert first == [sys.executable, "train.py", "predict"]
    folder = f"runs/x/seed0/{place}"
    assert settings["model.init_args.network.path"] == f"{folder}/export"
    assert settings["trainer.default_root_dir"] == folder
    fit = _fit(study, place)[2]
    data = {key: value for key, value in fit.items() if key.startswith("data.")}
    assert data == {key: value for key, value in settings.items() if key.startswith("data.")}
    assert Stage(study, "runs/x", 0, place).answers_from == [f"{folder}/export"]


def test_a_command_is_written_as_yaml_reads_it(study):
    study.instruct.settings |= {"data.init_args.language": None, "trainer.deterministic": True}
    _, _, settings = _fit(study, "instruct")
    assert settings["data.init_args.language"] == "null"
    assert settings["trainer.deterministic"] == "true"


@pytest.mark.parametrize("place", FITS)
def test_the_command_line_takes_the_commands_of_every_stage(
    study, place, command_line, capsys, tmp_path
):
    stage = Stage(study, str(tmp_path), 0, place)
    for command in (stage.fit_command, stage.answer_command):
        with pytest.raises(SystemExit) as left:
            command_line(*shlex.split(command)[2:], "--print_config")
        printed = capsys.readouterr()
        assert left.value.code in (0, None), printed.err
        config = yaml.safe_load(printed.out)
        kind = config["model"]["class_path"].rpartition(".")[2]
        assert kind == "SFTModule" or (" fit " in command and "booster" in place)


def test_measuring_callbacks_run_after_answering(study, tmp_path):
    stage = Stage(study, "runs/x", 0, "instruct")
    assert " && " not in stage.answer_command
    config = tmp_path / "checks.yaml"
    config.write_text("trainer:\n  callbacks+:\n    - class_path: StartChecks\n")
    study.instruct.config.append(str(config))
    assert " && " not in Stage(study, "runs/x", 0, "instruct").answer_command
    config = tmp_path / "prefix.yaml"
    config.write_text("trainer:\n  callbacks+:\n    - class_path: ForcedPrefix\n")
    study.instruct.config.append(str(config))
    predict, validate = Stage(study, "runs/x", 0, "instruct").answer_command.split(" && ")
    assert (_read(predict)[0][2], _read(validate)[0][2]) == ("predict", "validate")
    assert _read(predict)[1:] == _read(validate)[1:]


# -- what is judged and reported


def test_every_reported_stage_is_answered_and_judged(study):
    study = study.model_copy(update={"seed_list": [0, 1], "harmful_ratios": [0, 0.05]})
    files = evaluations(study, "runs/ci")
    assert len(files) == len(set(files)) == 2 * (1 + 2 + 2 * 1 * 2)
    assert "runs/ci/seed1/attack/booster/mild/p0.05/evaluation.json" in files
    assert "runs/ci/seed0/instruct/evaluation.json" in files
    assert not any("pretrain" in file for file in files), "nobody reads it"
    assert report_inputs(study, "runs/ci") == [
        "runs/ci/seed0/judged.json",
        "runs/ci/seed1/judged.json",
    ]


def test_a_stage_is_known_by_its_folder(study):
    for stage in evaluated(study, "runs/ci", 0):
        again = stage_at(study, "runs/ci", stage.folder.removeprefix("runs/ci/"))
        assert again == replace(stage)


# -- what makes it run again


@pytest.fixture
def tree(project_root, tmp_path, monkeypatch) -> Path:
    """A copy of the project's code, in which a test may change anything."""
    packages = ("temper", "lightning_modules", "datamodules", "callbacks", "strategies")
    for place in (*packages, "configs", "studies"):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(project_root / place, tmp_path / place, ignore=skip)
    shutil.copy(project_root / "train.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


STAGES = ("instruct", "align/booster", "align/vaccine", "attack/booster/mild/p0.2")


def _hashes() -> dict[str, str]:
    """Hashes of some stages of the tree as it is now."""
    from temper.study import contents, stages

    for cached in (stages.CODE, stages._digest, contents.read_config):
        cached.cache_clear()
    study = Study.load("studies/ci.yaml")
    study.objective_parts["vaccine"] = study.objective_parts["sft"].model_copy(
        update={"config": ["configs/objective/vaccine.yaml"]}
    )
    found = {}
    for place in STAGES:
        stage = Stage(study, "runs/ci", 0, place)
        found |= {f"fit {place}": stage.fit_code, f"answer {place}": stage.answer_code}
    judged = [Stage(study, "runs/ci", 0, place) for place in STAGES]
    return found | {"judge": judge_code(judged), "report": report_hash()}


def _changed(change) -> set[str]:
    before = _hashes()
    change()
    after = _hashes()
    return {name for name, value in after.items() if before[name] != value}


def _edit(file: str, old: str, new: str):
    def edit() -> None:
        path = Path(file)
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return edit


def _append(file: str, text: str = "\nCHANGED = 1\n"):
    return lambda: Path(file).write_text(Path(file).read_text() + text)


EVERY_FIT = {f"fit {place}" for place in STAGES}
EVERY_ANSWER = {f"answer {place}" for place in STAGES}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "again"),
    [
        (_append("temper/models/score.py", "\n# a comment\n"), set()),
        (
            _edit("lightning_modules/sft.py", '"""Supervised', '"""As said: supervised'),
            set(),
        ),
        (_edit("configs/objective/sft.yaml", "# Supervised", "# As said: supervised"), set()),
        (_append("temper/report/table.py"), {"report"}),
        (_append("temper/report/style.css", "\n.x { color: red }\n"), {"report"}),
        (_append("temper/preview/rows.py"), set()),
        (_append("temper/study/progress.py"), set()),
        (_append("temper/judges/grammar.py"), {"judge"}),
        (_append("temper/judges/keyword.py"), set()),
        (_append("callbacks/safety_evaluation.py"), {"judge"}),
        (_append("temper/models/generate.py"), EVERY_ANSWER),
        (_append("callbacks/answers.py"), EVERY_ANSWER),
        (_append("callbacks/run_card.py"), EVERY_FIT),
        (_append("temper/models/score.py"), EVERY_FIT | EVERY_ANSWER),
        (_append("temper/models/card.md.jinja", "\nx\n"), EVERY_FIT | EVERY_ANSWER),
        (_append("lightning_modules/vaccine.py"), {"fit align/vaccine"}),
        (
            _edit("configs/objective/vaccine.yaml", "max_grad_norm: 1.0", "max_grad_norm: 2.0"),
            {"fit align/vaccine"},
        ),
        (
            _edit(
                "configs/trainer/cpu.yaml",
                "- class_path: SafetyEvaluation",
                "- class_path: SafetyEvaluation\n      init_args:\n        judges:\n"
                "          - class_path: temper.judges.KeywordRefusal",
            ),
            {"judge"},
        ),
    ],
    ids=[
        "comment",
        "docstring",
        "comment in a config",
        "report",
        "style of the report",
        "preview",
        "progress",
        "judge",
        "judge that is not used",
        "what judges are asked by",
        "generation",
        "what answers are kept by",
        "run card",
        "score",
        "model card",
        "one objective",
        "settings of one objective",
        "choice of judges",
    ],
)
def test_a_change_reruns_only_dependent_stages(tree, change, again):
    assert _changed(change) == again


def test_a_change_of_the_judges_that_are_chosen_judges_again(tree):
    _edit(
        "configs/trainer/cpu.yaml",
        "- class_path: SafetyEvaluation",
        "- class_path: SafetyEvaluation\n      init_args:\n        judges:\n"
        "          - class_path: temper.judges.KeywordRefusal",
    )()
    assert _changed(_append("temper/judges/keyword.py")) == {"judge"}
