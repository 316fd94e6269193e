"""Every objective: two real processes with micro-batches of one row equal one process with the whole batch, in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.objective_cases import CASES, Case

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.distributed
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def train(out: Path, *launcher: str, size: int | None = None) -> dict[str, list[torch.Tensor] | str]:
    words = [sys.executable, *launcher, "tests/integration/every_objective_worker.py", f"--out={out}"]
    environment = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, *([f"--micro_batch_size={size}"] if size else [])], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("every_objective")
    return train(folder / "one.pt"), train(folder / "two.pt", *TORCHRUN, size=1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_and_micro_batches_equal_one_process(runs, case: Case):
    one, two = (run[str(case)] for run in runs)
    assert not isinstance(one, str), one
    if case.batch_statistic:
        assert "2 ranks" in two
        return
    assert not isinstance(two, str), two
    for left, right in zip(one, two, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)
