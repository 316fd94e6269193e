"""Runs strategy_worker.py in one process or in several, and compares weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
ACCELERATOR = "CHECK_ACCELERATOR"  # environment variable: the workers' accelerator (default: cpu)
LAUNCHER = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

Weights = dict[str, torch.Tensor]


def worker_environment(**more: str) -> dict[str, str]:
    """This process's environment, without the variables of a launcher."""
    return (
        {name: value for name, value in os.environ.items() if name not in LAUNCHER}
        | {"OMP_NUM_THREADS": "1"}
        | more
    )


def train_py(*words: object) -> None:
    """Run ``train.py`` with these arguments; it must succeed."""
    command = [sys.executable, "train.py", *map(str, words)]
    done = subprocess.run(
        command, cwd=ROOT, env=worker_environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]


def run_cases(
    folder: Path, cases: list[dict[str, Any]], ranks: int, accelerator: str = "cpu"
) -> dict[str, Any]:
    """Train every case; returns its weights, or the message of its refusal, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / f"cases_{ranks}.json"
    out = folder / f"weights_{ranks}.pt"
    plan.write_text(json.dumps(cases))
    launcher = (*TORCHRUN[:-1], f"--nproc_per_node={ranks}") if ranks > 1 else ()
    words = [
        sys.executable,
        *launcher,
        "tests/integration/strategy_worker.py",
        f"--cases={plan}",
        f"--out={out}",
    ]
    environment = worker_environment(PYTHONPATH=str(ROOT)) | {ACCELERATOR: accelerator}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return torch.load(out)


def largest_difference(left: Weights, right: Weights) -> float:
    """Largest absolute difference over all weights, which must have the same names."""
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)
