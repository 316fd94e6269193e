"""slurm/train.sbatch on a real SLURM: two tasks train, are preempted, resume, and fail."""

import json
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slurm

STEPS = ("--trainer.max_steps=500", "--trainer.val_check_interval=250")
ENDLESS = ("--trainer.max_steps=1000000", "--trainer.val_check_interval=1000000")
TRAINING = "All distributed processes registered"


@pytest.fixture(scope="module")
def whole(submit):
    """A job that nobody interrupts."""
    job = submit("whole", *STEPS)
    assert job.end() == "COMPLETED", job.text
    return job


def test_two_tasks_train(whole):
    card = json.loads((whole.folder / "card.json").read_text())
    assert (card["devices"], card["cost"]["steps"]) == (2, 500)
    assert {"config.yaml", "code.json", "metrics.csv", "evaluation.json", "export"} <= {
        path.name for path in whole.folder.iterdir()
    }
    assert (
        json.loads((whole.folder / "code.json").read_text())["slurm"]["SLURM_JOB_ID"]
        == whole.number
    )
    assert re.search(r"^1: .*GLOBAL_RANK: 1", whole.text, re.MULTILINE), "every line has its rank"


@pytest.mark.parametrize("times", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_a_job_preempted_at_random_has_the_same_results(submit, whole, times):
    moments = random.Random()  # noqa: S311
    job = submit(f"preempted{times}", *STEPS)
    for n in range(1, times + 1):
        job.wait_for(TRAINING, n)
        time.sleep(moments.uniform(0, 2))
        job.signal_all("USR1")
        job.wait(lambda n=n: job.shown("Restarts") == str(n), f"queued again {n} times")
        assert len(list(job.folder.glob("hpc_ckpt_*"))) <= 1
    assert job.end(400) == "COMPLETED", job.text
    # A signal that comes before the callback is there ends the tasks, and the batch script has the
    # job queued again.
    assert (
        job.text.count("The job is queued again") + job.text.count("ended with status 138") == times
    )
    assert f"start {times + 1}" in job.text
    weights, expected = (
        load_file(folder / "export" / "model.safetensors") for folder in (job.folder, whole.folder)
    )
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert (job.folder / "generations.jsonl").read_text() == (
        whole.folder / "generations.jsonl"
    ).read_text()
    names = {path.name for path in job.folder.iterdir()}
    assert "config.yaml" in names and "config.1.yaml" not in names, (
        "a job that starts again has the same config"
    )
    assert not [name for name in names if "hpc_ckpt" in name]


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("scancel", r"rank [01]: received SIGTERM"),
        ("SIGTERM", r"rank 1: received SIGTERM"),
        ("SIGKILL", r"srun: error: .*task 1: Killed"),
    ],
)
def test_a_job_ends_within_a_minute_and_says_which_rank(submit, how, named):
    job = submit(how, *ENDLESS)
    job.wait_until_it_trains()
    if how == "scancel":
        subprocess.run(("scancel", job.number), check=True)
    else:
        job.signal_rank(1, signal.Signals[how])
    seconds = job.wait(lambda: job.shown("JobState") in ("FAILED", "CANCELLED"), "over", 60)
    print(f"{how}: over after {seconds:.1f} s", file=sys.stderr)
    assert re.search(named, job.text), job.text
    assert job.shown("Restarts") == "0"
    assert bool(list(job.folder.glob("hpc_ckpt_1.ckpt"))) == (how != "SIGKILL")


def test_a_task_without_scontrol_leaves_it_to_the_batch_script(submit):
    """As in a container: the exit status asks for it."""
    python = f"env PATH=/nowhere {sys.executable}"
    job = submit("container", *ENDLESS, python=python)
    job.wait_until_it_trains()
    job.signal_all("USR1")
    job.wait(lambda: job.shown("Restarts") == "1", "queued again")
    assert "no scontrol" in job.text


def test_an_array_trains_one_seed_per_task(submit):
    job = submit(
        "seeds",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        tasks=1,
        sbatch=("--array=0-1",),
    )
    for seed in (0, 1):
        card = job.folder / f"seed{seed}" / "card.json"
        job.wait(card.exists, f"seed {seed} trained")
        assert json.loads(card.read_text())["seed"] == seed
