"""Every objective under every strategy: two ranks equal one process; resumption is exact."""

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from tests.integration.strategy_runs import ROOT, TORCHRUN, worker_environment
from tests.objective_cases import CASES, PERTURBING, Case
from tests.objectives import same_bits

pytestmark = pytest.mark.distributed
DOUBLE = ("ddp", "fsdp2")
SINGLE = ("zero2", "zero3")  # DeepSpeed has no float64
RESUMED = ("ddp", "fsdp2")  # the others: test_resume.py
# Refusals and their text: ZeRO's optimizer sees one flat vector, so no weight can skip a step.
REFUSED = {("TVaccine", "zero2"): "use ddp or fsdp2", ("TVaccine", "zero3"): "use ddp or fsdp2"}

Results = dict[str, list[torch.Tensor] | str]


def train(out: Path, *words: str, launcher: tuple[str, ...] = ()) -> Results:
    command = [
        sys.executable,
        *launcher,
        "tests/integration/every_objective_worker.py",
        f"--out={out}",
        *words,
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=worker_environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results]:
    folder = tmp_path_factory.mktemp("every_objective")
    one = train(folder / "one.pt", "--strategies", "double", "single", "--single", "single")
    resumed = [f"{strategy}+resume" for strategy in RESUMED]
    two = (
        "--strategies",
        *DOUBLE,
        *SINGLE,
        *resumed,
        "--single",
        *SINGLE,
        "--perturbing",
        "zero2",
        "--micro_batch_size=1",
    )
    return one, train(folder / "two.pt", *two, launcher=TORCHRUN)


@pytest.mark.parametrize(
    ("case", "strategy"),
    [*product(CASES, (*DOUBLE, "zero3")), *((case, "zero2") for case in PERTURBING)],
    ids=str,
)
def test_two_ranks_and_micro_batches_equal_one_process(runs, case: Case, strategy: str):
    precision = "double" if strategy in DOUBLE else "single"
    one = runs[0][f"{precision}: {case}"]
    two = runs[1][f"{strategy}: {case}"]
    assert not isinstance(one, str), one
    if case.batch_statistic:
        assert "2 ranks" in two
        return
    if message := REFUSED.get((str(case), strategy)):
        assert message in two
        return
    assert not isinstance(two, str), two
    tolerance = {"rtol": 1e-8, "atol": 1e-10} if strategy in DOUBLE else {"rtol": 0, "atol": 1e-6}
    for left, right in zip(one, two, strict=True):
        torch.testing.assert_close(left, right, **tolerance)


@pytest.mark.parametrize("strategy", RESUMED)
@pytest.mark.parametrize("case", [case for case in CASES if not case.batch_statistic], ids=str)
def test_resumed_equals_uninterrupted_bit_for_bit(runs, case: Case, strategy: str):
    uninterrupted = runs[1][f"{strategy}: {case}"]
    resumed = runs[1][f"{strategy}+resume: {case}"]
    assert not isinstance(resumed, str), resumed
    assert same_bits(uninterrupted, resumed)
