"""DDP with two processes on gloo equals one process with the same global batch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.strategy_runs import ROOT, largest_difference, worker_environment

pytestmark = pytest.mark.distributed


def train(out: Path, devices: int, *words: str) -> dict[str, Any]:
    """Run the worker and read the files that it wrote."""
    out.mkdir()
    command = [
        sys.executable,
        "tests/integration/ddp_worker.py",
        "--devices",
        str(devices),
        "--out",
        str(out),
        *words,
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=worker_environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "report.json").read_text()) | {
        "weights": torch.load(out / "weights.pt"),
        "evaluation": json.loads((out / "evaluation.json").read_text()),
        "generations": (out / "generations.jsonl").read_text(),
        "card": json.loads((out / "card.json").read_text()),
    }


@pytest.mark.parametrize(
    ("words", "reductions"),
    [
        (("--micro_batch_size", "3"), 2 * 4),
        (("--refresh_every", "3"), (3 + 1 + 1 + 3)),  # refreshed at steps 0 and 3, held in between
        (("--objective", "sft"), 4),
    ],
    ids=lambda value: "_".join(value).strip("-") if isinstance(value, tuple) else None,
)
def test_two_processes_equal_one(tmp_path: Path, words: tuple[str, ...], reductions: int):
    one = train(tmp_path / "one", 1, *words)
    two = train(tmp_path / "two", 2, *words)
    assert largest_difference(two["weights"], one["weights"]) < 1e-6
    assert two["reductions"] == reductions
    for name in one["metrics"]:
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-4, abs=1e-6), name
    assert two["evaluation"] == one["evaluation"]
    assert two["generations"] == one["generations"]
    assert two["card"]["cost"]["tokens"] == one["card"]["cost"]["tokens"]
