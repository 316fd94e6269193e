"""A study whose stages are jobs."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]
TWO_STEPS = {
    "trainer.max_steps": 2,
    "data.init_args.n_eval": 8,
    "model.init_args.lr_scheduler.init_args.total_steps": 2,
}


@pytest.mark.usefixtures("slurm")
def test_a_study_of_four_stages_runs_as_jobs(tmp_path):
    settings = TWO_STEPS | {"model.init_args.lr_scheduler.init_args.warmup_steps": 1}
    study = {
        "base": str(ROOT / "studies" / "ci.yaml"),
        "name": "four",
        "title": "Four stages",
        "pretrain": {"set": {"trainer.max_steps": 2}},
        "instruct": {"set": settings},
        "align": {"set": settings},
        "attack": {"set": {"data.init_args.n_eval": 8, "data.init_args.n_rows": 20}},
        "objectives": {"sft": {"label": "SFT", "config": ["configs/objective/sft.yaml"]}},
        "attacks": {"mild": {"label": "milder attack", "lr": 3.0e-4, "steps": 2}},
        "harmful_ratios": [0.2],
        "headline": {"attack": "mild", "baseline": "sft", "method": "sft"},
    }
    file = tmp_path / "four.yaml"
    file.write_text(yaml.safe_dump(study))
    words = (
        "--runs",
        str(tmp_path / "runs"),
        "--profile",
        "slurm/profile",
        "--slurm-init-seconds-before-status-checks",
        "2",
    )
    logs = ("--slurm-logdir", str(tmp_path / "logs"), "--slurm-keep-successful-logs")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    command = (sys.executable, "-m", "temper.study.run", str(file), *words, *logs)
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stdout + done.stderr
    fits = ["pretrain", "instruct", "align", "attack"]
    jobs = [*fits, *["answers"] * 3, "judge", "report"]
    shown = re.findall(r"^done +\d/9 +(\w+)", done.stdout, re.MULTILINE)
    assert sorted(shown) == sorted(jobs)
    assert [job for job in shown if job in fits] == fits
    results = list(csv.DictReader((tmp_path / "runs" / "four" / "results.csv").open()))
    assert {row["stage"] for row in results} >= {"aligned", "attacked"}
    assert len(list((tmp_path / "logs").rglob("*.log"))) == len(jobs) - 1, (
        "the report is made where the study was started"
    )
