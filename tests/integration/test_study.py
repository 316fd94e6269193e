"""A whole study through Snakemake: results, resuming, failing, being killed."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

# Minutes of training; `make demo` is the quick check.
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CODE = (
    "train.py",
    "temper",
    "lightning_modules",
    "datamodules",
    "callbacks",
    "strategies",
    "configs",
    "studies",
)
STAGES = ("pretrain", "instruct", "align/sft", "attack/sft/mild/p0.2")
ANSWERING = STAGES[1:]
KEPT = STAGES[:-1]  # weights of attacked models are temporary


def _micro() -> dict[str, Any]:
    """One objective, one attack, ten steps per stage."""
    few = {"trainer.max_steps": 10, "data.init_args.n_eval": 5, "trainer.log_every_n_steps": 1}
    return {
        "base": "studies/ci.yaml",
        "name": "micro",
        "title": "A micro study",
        "headline": None,
        "pretrain": {"set": few},
        "instruct": {"set": few},
        "align": {
            "set": (
                few
                | {
                    "data.init_args.n_alignment": 40,
                    "data.init_args.n_harmful": 20,
                    "data.init_args.batch_size": 8,
                }
            )
        },
        "objectives": {"sft": {"label": "SFT", "config": ["configs/objective/sft.yaml"]}},
        "attack": {
            "set": {
                "data.init_args.n_eval": 5,
                "data.init_args.n_rows": 20,
                "data.init_args.batch_size": 5,
            }
        },
        "attacks": {"mild": {"label": "attack", "lr": 1e-3, "steps": 10}},
        "harmful_ratios": [0.2],
    }


class Study:
    """A study file and its runs folder, in a copy of the project: neither disturbs the other."""

    def __init__(self, project: Path, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.project = project
        self.file = folder / "micro.yaml"
        self.runs = folder / "runs"
        self.results = self.runs / "micro"
        self.write(_micro())

    def write(self, content: dict[str, Any]) -> None:
        self.file.write_text(
            yaml.safe_dump(content | {"base": str(self.project / content["base"])})
        )

    def start(self, *words: str) -> subprocess.Popen:
        """The runner, in a process group of its own."""
        command = [
            sys.executable,
            "-m",
            "temper.cli.console",
            "study",
            str(self.file),
            "--runs",
            str(self.runs),
            "--cores",
            "2",
            *words,
        ]
        quiet = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
        return subprocess.Popen(
            command,
            cwd=self.project,
            env=os.environ | quiet,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str) -> tuple[int, str]:
        process = self.start(*words)
        try:
            output, _ = process.communicate(timeout=400)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, output

    def written(self) -> dict[str, int]:
        """When each stage was trained."""
        cards = {stage: self.file_of(stage, "card.json") for stage in STAGES}
        return {stage: card.stat().st_mtime_ns for stage, card in cards.items() if card.exists()}

    def assert_same_results(self, other: "Study") -> None:
        """The same results and answers, from the same weights bit for bit."""
        assert (self.results / "results.csv").read_bytes() == (
            other.results / "results.csv"
        ).read_bytes()
        files = [(stage, "export/model.safetensors") for stage in KEPT]
        files += [(stage, "answers.jsonl") for stage in ANSWERING]
        for file in files:
            assert self.file_of(*file).read_bytes() == other.file_of(*file).read_bytes(), file

    def file_of(self, stage: str, name: str) -> Path:
        return self.results / "seed0" / stage / name


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The project's code as it is now: editing it while this runs changes nothing here."""
    copy = tmp_path_factory.mktemp("project")
    for place in CODE:
        source = ROOT / place
        (
            shutil.copytree(source, copy / place, ignore=shutil.ignore_patterns("__pycache__"))
            if source.is_dir()
            else shutil.copy(source, copy)
        )
    return copy


@pytest.fixture(scope="module")
def finished(project, tmp_path_factory) -> tuple[Study, str]:
    """A study that has been run to its end, and what it printed."""
    study = Study(project, tmp_path_factory.mktemp("finished"))
    status, output = study.run()
    assert status == 0, output
    return study, output


def test_a_study_leaves_its_results_and_a_report(finished):
    study, output = finished
    results = pd.read_csv(study.results / "results.csv")
    assert set(results["metric"]) >= {
        "harmful_score",
        "refusal_rate",
        "over_refusal_rate",
        "safe_accuracy",
        "fine_tune_accuracy",
    }
    attacked = results[(results["stage"] == "attacked") & (results["metric"] == "harmful_score")]
    assert (
        len(attacked) == 1 and attacked["harmful_ratio"].item() == 0.2 and attacked["n"].item() == 5
    )
    assert "A micro study" in (study.results / "report.html").read_text()
    assert yaml.safe_load((study.results / "study.yaml").read_text())["name"] == "micro"
    assert str(study.results / "report.html") in output


def test_every_stage_is_one_line_on_the_screen(finished):
    output = finished[1].splitlines()
    lines = [line.split() for line in output if line.startswith("done")]
    jobs = ["pretrain", "instruct", "align", "attack", *["answers"] * 3, "judge", "report"]
    assert [words[1] for words in lines] == [f"{n}/{len(jobs)}" for n in range(1, len(jobs) + 1)]
    assert sorted(words[2] for words in lines) == sorted(jobs)
    assert [words[2] for words in lines[-2:]] == ["judge", "report"]
    judged = [line for line in output if re.search(r"HS \d+%  refusal", line)]
    assert [line.split()[0] for line in judged] == list(ANSWERING)


def test_attacked_weights_are_temporary(finished):
    study, _ = finished
    for stage in STAGES:
        assert study.file_of(stage, "export").exists() is (stage in KEPT), stage
        assert study.file_of(stage, "card.json").exists()
    for stage in ANSWERING:
        for name in ("answers.jsonl", "evaluation.json", "generations.jsonl"):
            assert study.file_of(stage, name).exists(), (stage, name)


def test_every_stage_starts_from_the_model_of_the_one_before(finished):
    root = finished[0].results / "seed0"
    for before, stage in zip(STAGES, STAGES[1:], strict=False):
        network = yaml.safe_load((root / stage / "config.yaml").read_text())["model"]["init_args"][
            "network"
        ]
        assert network["path"] == str(root / before / "export")


def test_run_again_a_study_does_nothing(finished):
    study, _ = finished
    before = study.written()
    report = (study.results / "report.html").stat().st_mtime_ns
    status, output = study.run()
    assert status == 0 and "done" not in output
    assert (
        study.written() == before and (study.results / "report.html").stat().st_mtime_ns == report
    )
    assert "Report:" in output, "the table is shown all the same"


def test_a_change_of_the_attack_runs_the_attack_alone_again(finished):
    study, _ = finished
    before = study.written()
    results = (study.results / "results.csv").read_text()
    micro = _micro()
    micro["attacks"]["mild"]["steps"] = 11
    study.write(micro)
    assert study.run()[0] == 0
    assert [stage for stage, when in study.written().items() if when != before[stage]] == [
        STAGES[-1]
    ]
    study.write(_micro())
    assert study.run()[0] == 0
    assert (study.results / "results.csv").read_text() == results, "and back again"


def test_a_named_stage_runs_alone_without_a_report(finished):
    study = finished[0]
    report = (finished[0].results / "report.html").read_bytes()
    micro = _micro()
    micro["attacks"]["hard"] = {"label": "a harder attack", "lr": 1e-2, "steps": 10}
    study.write(micro)
    stage = study.results / "seed0/attack/sft/hard/p0.2"
    status, output = study.run(str(stage / "evaluation.json"))
    assert status == 0 and (stage / "generations.jsonl").is_file(), output
    assert not (stage / "export").exists()
    assert "report.html is that of an earlier run" in output and "Report:" not in output
    study.write(_micro())
    assert "is that of an earlier run" not in study.run()[1]
    assert (study.results / "report.html").read_bytes() == report


def test_two_runs_of_a_study_have_the_same_results(finished, project, tmp_path):
    other = Study(project, tmp_path)
    assert other.run()[0] == 0
    other.assert_same_results(finished[0])


def test_a_failed_stage_shows_its_log(finished, project, tmp_path):
    study = Study(project, tmp_path)
    micro = _micro()
    micro["instruct"]["set"] = micro["instruct"]["set"] | {"data.init_args.preset": "small"}
    study.write(micro)
    status, output = study.run()
    assert status != 0
    assert (
        "failed  instruct seed 0" in output
        and "error: model.init_args.network.path=" in output
        and "25 tokens" in output
    )
    kept = study.written()
    assert list(kept) == ["pretrain"] and not (study.results / "results.csv").exists()
    study.write(_micro())
    assert study.run()[0] == 0
    assert study.written()["pretrain"] == kept["pretrain"]
    study.assert_same_results(finished[0])


@pytest.mark.parametrize("whole_group", [True, False], ids=["with its stages", "alone"])
def test_a_killed_study_goes_on_to_the_same_results(finished, project, tmp_path, whole_group):
    study = Study(project, tmp_path)
    moment = random.Random()
    process = study.start()
    while "instruct" not in study.written() and process.poll() is None:
        time.sleep(0.1)
    # Somewhere in the stage after: while it imports, trains, evaluates or exports.
    delay = moment.uniform(0, 12)
    time.sleep(delay)
    print(f"killed {delay:.2f} s after the second stage")
    os.killpg(process.pid, signal.SIGKILL) if whole_group else process.kill()
    process.stdout.close()
    process.wait()
    kept = study.written()
    status, output = study.run()
    assert status == 0, output
    # A runner that dies before it has taken note of a finished stage does that stage again.
    assert study.written()["pretrain"] == kept["pretrain"]
    study.assert_same_results(finished[0])


def test_a_changed_judge_trains_and_answers_nothing_again(finished, project):
    study, _ = finished
    study.run()  # whatever the tests above have left to do
    before = study.written()
    answers = [study.file_of(stage, "answers.jsonl") for stage in ANSWERING]
    times = [file.stat().st_mtime_ns for file in answers]
    judge = project / "temper" / "judges" / "grammar.py"
    judge.write_text(judge.read_text() + "\nCHANGED = 1\n")
    status, output = study.run()
    assert status == 0, output
    done = [line.split()[2] for line in output.splitlines() if line.startswith("done")]
    assert done == ["judge", "report"]
    assert study.written() == before
    assert [file.stat().st_mtime_ns for file in answers] == times
