"""Jobs on a real SLURM: slurm/single_node.sh starts one."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Job:
    """One job, from its submission to its end."""

    def __init__(self, number: str, folder: Path, log: Path) -> None:
        self.number = number
        self.folder = folder
        self.log = log

    def shown(self, key: str) -> str:
        """A field of ``scontrol show job``."""
        found = re.search(rf"\b{key}=(\S+)", _output("scontrol", "show", "job", self.number))
        return found[1] if found else ""

    @property
    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 240) -> float:
        """Wait, and fail with the end of the log; the seconds it took."""
        start = time.monotonic()
        while not condition():
            if time.monotonic() - start > seconds:
                pytest.fail(
                    f"not {what} after {seconds} s: {self.shown('JobState')}"
                    f" {self.shown('Reason')}\n{self.text[-3000:]}"
                )
            time.sleep(0.2)
        return time.monotonic() - start

    def wait_for(self, words: str, times: int = 1) -> None:
        """Wait until the log says something so often."""
        self.wait(
            lambda: self.text.count(words) >= times or self.shown("JobState") in OVER,
            f"{times} x {words!r}",
        )
        assert self.text.count(words) >= times, (
            f"over before {times} x {words!r}\n{self.text[-3000:]}"
        )

    def wait_until_it_trains(self) -> None:
        """Wait for the first hundred steps: metrics are written that often."""
        self.wait(
            lambda: (self.folder / "metrics.csv").exists() or self.shown("JobState") in OVER,
            "training",
        )

    def end(self, seconds: float = 240) -> str:
        """Wait for the end of the job; its state."""
        self.wait(lambda: self.shown("JobState") in OVER, "over", seconds)
        return self.shown("JobState")

    def signal_all(self, name: str) -> None:
        """What ``--signal`` does before the time limit: to every task, not to the batch script."""
        subprocess.run(("scancel", f"--signal={name}", self.number), check=True)

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        """A signal to the process of one rank alone."""
        os.kill(self.process(rank), number)

    def process(self, rank: int) -> int:
        """Its process number."""
        for place in Path("/proc").glob("[0-9]*"):
            try:
                environment = (place / "environ").read_bytes().split(b"\0")
                command = (place / "cmdline").read_bytes()
            except OSError:
                continue
            if {f"SLURM_JOB_ID={self.number}".encode(), f"SLURM_PROCID={rank}".encode()} <= set(
                environment
            ) and b"train.py" in command:
                return int(place.name)
        raise AssertionError(f"rank {rank} of job {self.number} is not there")


def _output(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True).stdout


@pytest.fixture(scope="session")
def slurm() -> None:
    """A SLURM that answers; without one tests are skipped, and in CI they fail."""
    if shutil.which("sinfo") and _output("sinfo", "--noheader", "--format=%T").strip():
        return
    reason = "no SLURM is running on this machine; `slurm/single_node.sh start` starts one"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def submit(slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Job]]:
    """``submit("name", *words_for_fit, tasks=2, sbatch=(...))``: a tiny Booster run through
    slurm/train.sbatch.
    """
    place = tmp_path_factory.mktemp("slurm")
    jobs: list[str] = []

    def start(
        name: str,
        *words: str,
        tasks: int = 2,
        sbatch: tuple[str, ...] = (),
        python: str | None = None,
    ) -> Job:
        folder = place / name
        configs = ("trainer/cpu", "objective/booster", "model/tiny", "data/alignment")
        command = (
            "sbatch",
            "--parsable",
            f"--ntasks-per-node={tasks}",
            f"--output={place}/{name}-%a.log",
            *sbatch,
            "slurm/train.sbatch",
            *(f"--config=configs/{config}.yaml" for config in configs),
            *(["--trainer.strategy=ddp"] if tasks > 1 else []),
            "--data.init_args.preset=tiny",
            "--data.init_args.n_eval=8",
            "--data.init_args.n_alignment=40",
            "--data.init_args.n_harmful=20",
            "--data.init_args.batch_size=4",
            "--data.init_args.harmful_batch_size=4",
            "--trainer.log_every_n_steps=1",
            f"--trainer.default_root_dir={folder}",
            *words,
        )
        # What runs the tests may itself be in a job.
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM_", "SBATCH_"))
        }
        environment |= {"PYTHON": python} if python else {}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        jobs.append(done.stdout.strip())
        return Job(
            jobs[-1], folder, place / f"{name}-4294967294.log"
        )  # what %a is outside of an array

    yield start
    for number in jobs:
        subprocess.run(("scancel", "--quiet", number))
