"""Judging is a stage of its own: the same files as an evaluation in a fit, and nothing twice."""

import json
import shlex
from pathlib import Path

import pytest

from temper.study import Study, judge
from temper.study.stages import Stage, evaluated

FILES = ("evaluation.json", "generations.jsonl")


@pytest.fixture(scope="module")
def study(project_root_once) -> Study:
    """ci.yaml in two steps and four prompts a kind."""
    study = Study.load("studies/ci.yaml")
    study.pretrain.settings |= {
        "trainer.max_steps": 2,
        "data.init_args.batch_size": 4,
        "data.init_args.n_eval": 4,
    }
    return study


@pytest.fixture(scope="module")
def project_root_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        yield


@pytest.fixture(scope="module")
def answered(study, command_line, tmp_path_factory) -> tuple[Stage, dict[str, str]]:
    """A stage that has been trained, evaluated as a fit does, and has answered."""
    stage = Stage(study, str(tmp_path_factory.mktemp("runs")), 0, "pretrain")
    fit = shlex.split(stage.fit_command)[2:]
    command_line(*fit, "--trainer.limit_val_batches=1.0")
    folder = Path(stage.folder)
    written = {name: (folder / name).read_text() for name in (*FILES, "metrics.csv")}
    for name in FILES:
        (folder / name).unlink()
    command_line(*shlex.split(stage.answer_command)[2:])
    return stage, written


def test_judging_stored_answers_equals_judging_in_the_fit(answered):
    stage, written = answered
    assert judge.judge(stage)
    folder = Path(stage.folder)
    assert {name: (folder / name).read_text() for name in written} == written
    assert json.loads(written["evaluation.json"])["step"] == 2


def test_a_stage_that_is_judged_is_left_alone(answered):
    stage, _ = answered
    judge.judge(stage)
    before = (Path(stage.folder) / "evaluation.json").stat().st_mtime_ns
    assert not judge.judge(stage)
    assert (Path(stage.folder) / "evaluation.json").stat().st_mtime_ns == before


# -- what makes it judge again: with judges that only write that they were asked


@pytest.fixture
def counted(monkeypatch, tmp_path, project_root):
    """Stages of a seed with answers, and the places that were judged."""
    study = Study.load("studies/ci.yaml")
    asked: list[str] = []

    def validate(stage: Stage) -> None:
        asked.append(stage.place)
        for name in FILES:
            (Path(stage.folder) / name).write_text("{}")

    monkeypatch.setattr(judge, "_validate", validate)
    stages = evaluated(study, str(tmp_path / "ci"), 0)
    for stage in stages:
        folder = Path(stage.folder)
        folder.mkdir(parents=True)
        (folder / "answers.jsonl").write_text(stage.place)
        (folder / "card.json").write_text('{"cost": {"steps": 7}}')
    return stages, asked


def _judge_all(stages) -> int:
    return judge.main(["studies/ci.yaml", stages[0].runs, "0"])


def test_a_seed_is_judged_once(counted, capsys):
    stages, asked = counted
    assert _judge_all(stages) == 0
    assert asked == [stage.place for stage in stages]
    stamp = json.loads((Path(stages[0].runs) / "seed0" / "judged.json").read_text())
    assert stamp == {"stages": [stage.folder for stage in stages]}
    assert json.loads((Path(stages[0].folder) / "evaluation.json").read_text()) == {"step": 7}
    asked.clear()
    assert _judge_all(stages) == 0 and asked == []
    assert f"judged 0 of {len(stages)} stages" in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["answers.jsonl", *FILES, "judged.json"])
def test_a_stage_whose_files_changed_is_judged_again(counted, lost):
    stages, asked = counted
    _judge_all(stages)
    asked.clear()
    file = Path(stages[1].folder) / lost
    file.write_text("other answers") if lost == "answers.jsonl" else file.unlink()
    assert _judge_all(stages) == 0 and asked == [stages[1].place]


def test_other_judges_judge_again(counted, monkeypatch):
    stages, asked = counted
    _judge_all(stages)
    asked.clear()
    monkeypatch.setattr(Stage, "judge_code", "another")
    assert _judge_all(stages) == 0 and len(asked) == len(stages)


def test_one_stage_alone(counted):
    stages, asked = counted
    folder = stages[1].folder.removeprefix(f"{stages[1].runs}/")
    assert judge.main(["studies/ci.yaml", stages[1].runs, "--stage", folder]) == 0
    assert asked == [stages[1].place]


def test_missing_answers_are_named(counted, capsys):
    stages, _ = counted
    (Path(stages[1].folder) / "answers.jsonl").unlink()
    assert _judge_all(stages) == 2
    line = capsys.readouterr().err
    assert "answers.jsonl: missing; run the study" in line and line.count("\n") == 1
