"""Snakemake's events become one line per stage, and the end of the log of a stage that failed."""

import json
import logging
from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from temper.study.progress import TAIL, LogHandler


class Screen:
    """A handler whose output can be read, fed with the events of a study."""

    def __init__(self) -> None:
        self.handler = LogHandler(SimpleNamespace(), None)
        self.handler.console = Console(file=StringIO(), width=200)

    def event(self, event, level=logging.INFO, **fields) -> str:
        """Send one event; what it printed."""
        record = logging.makeLogRecord(
            {"msg": fields.pop("msg", ""), "levelno": level, "levelname": "INFO"} | fields
        )
        if event:
            record.event = SimpleNamespace(value=event)
        start = self.handler.console.file.tell()
        self.handler.emit(record)
        return self.handler.console.file.getvalue()[start:]

    def start(self, jobid: int, rule: str, output=(), log=(), **wildcards: str) -> str:
        return self.event(
            "job_info",
            jobid=jobid,
            rule_name=rule,
            wildcards=wildcards,
            output=list(output),
            log=list(log),
        )


@pytest.fixture
def screen() -> Screen:
    screen = Screen()
    screen.event("run_info", stats={"all": 1, "pretrain": 1, "attack": 2, "report": 1, "total": 5})
    return screen


def test_a_judged_seed_shows_metrics_of_its_stages(screen, tmp_path):
    figures = {
        "harmful_score": 0.125,
        "refusal_rate": 0.8,
        "safe_accuracy": 1.0,
        "fine_tune_accuracy": 0.5,
        "degenerate_rate": 0.0,
    }
    stage = tmp_path / "seed0" / "attack" / "sft"
    stage.mkdir(parents=True)
    (stage / "evaluation.json").write_text(
        json.dumps({"metrics": {name: {"value": value} for name, value in figures.items()}})
    )
    judged = tmp_path / "seed0" / "judged.json"
    judged.write_text(json.dumps({"stages": [str(stage)]}))
    assert screen.start(3, "judge", output=[judged], seed="0") == ""
    done, line = screen.event("job_finished", job_id=3).splitlines()
    assert done.split()[:2] == ["done", "1/4"] and "judge seed 0" in done and " s" in done
    assert line.split()[0] == "attack/sft"
    for words in ("HS 12%", "refusal 80%", "safe 100%", "FA 50%"):
        assert words in line


def test_a_stage_that_trained_is_one_line(screen, tmp_path):
    names = {"seed": "0", "objective": "booster", "attack": "mild", "ratio": "0.2"}
    assert screen.start(3, "attack", output=[tmp_path / "export"], **names) == ""
    line = screen.event("job_finished", job_id=3)
    assert line.count("\n") == 1 and "attack booster mild p=0.2 seed 0" in line


def test_one_stage_that_is_judged_alone_has_its_metrics(screen, tmp_path):
    evaluation = tmp_path / "evaluation.json"
    evaluation.write_text(json.dumps({"metrics": {"harmful_score": {"value": 0.5}}}))
    screen.start(3, "judge_one", output=[evaluation], folder="seed0/align/sft")
    assert "HS 50%" in screen.event("job_finished", job_id=3)


def test_stages_are_counted_without_rule_all(screen):
    screen.start(1, "pretrain", seed="0")
    screen.start(2, "report")
    screen.start(0, "all")
    assert "1/4" in screen.event("job_finished", job_id=1)
    assert "2/4" in screen.event("job_finished", job_id=2)
    assert screen.event("job_finished", job_id=0) == ""


def test_a_stage_without_figures_still_has_its_line(screen):
    screen.start(1, "report", output=["runs/ci/report.html"])
    assert screen.event("job_finished", job_id=1).startswith("done   1/4  report")


def test_a_failed_stage_shows_the_end_of_its_log(screen, tmp_path):
    log = tmp_path / "log.txt"
    log.write_text(
        "".join(f"line {n}\n" for n in range(100)) + "error: [bold]lr=1[/bold] is too high\n"
    )
    screen.start(1, "align", log=[log], seed="0", objective="sft")
    text = screen.event("job_error", jobid=1)
    first, *tail = text.splitlines()
    assert (
        first.startswith("failed")
        and "align sft seed 0" in first
        and str(log) in first.replace("\n", "")
    )
    assert len(tail) == TAIL
    assert (
        tail[-1].strip() == "error: [bold]lr=1[/bold] is too high"
        and tail[0].strip() == f"line {100 - TAIL + 1}"
    )


def test_a_failed_stage_without_a_log_still_has_its_line(screen, tmp_path):
    screen.start(1, "align", log=[tmp_path / "none.txt"], seed="0", objective="sft")
    assert screen.event("job_error", jobid=1).startswith("failed")


def test_only_errors_of_snakemake_are_shown(screen):
    assert "MissingInputException" in screen.event(
        None, level=logging.ERROR, msg="MissingInputException: no rule"
    )
    assert screen.event(None, level=logging.INFO, msg="Select jobs to execute") == ""
    assert screen.event("progress", done=1, total=5) == ""


def test_a_stage_that_is_tried_again_says_how_often(screen, tmp_path):
    names = {"log": [tmp_path / "log.txt"], "seed": "0", "objective": "sft"}
    screen.start(7, "align", **names)
    failed = screen.event(
        "job_error",
        jobid=7,
        rule_msg="SLURM-job '12' failed, SLURM status is: 'TIMEOUT'. For further error details see",
    )
    assert (
        "align sft seed 0, attempt 1" in failed
        and "status is: 'TIMEOUT'." in failed
        and "further" not in failed
    )
    again = screen.event(None, msg="Trying to restart job 7.")
    assert again.split()[0] == "again" and "align sft seed 0, attempt 2" in again
    screen.start(7, "align", **names)
    assert "attempt 2" in screen.event("job_error", jobid=7)
    screen.event(None, msg="Trying to restart job 7.")
    screen.start(7, "align", **names)
    assert screen.event("job_finished", job_id=7).rstrip().endswith("attempt 3")
