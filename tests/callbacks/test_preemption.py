"""A signal at any moment: all ranks save between steps and stop; resuming changes no weight."""

import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from callbacks import Preemption
from callbacks.preemption import TRY_AGAIN, Preempted
from temper.errors import TemperError
from tests.objectives import fit, make_data, make_module, same_bits, weights

ROOT = Path(__file__).parents[2]
# validations after steps 3 and 6
STEPS = 6
INTERVAL = 3


class Recorder(L.Callback):
    """Sends a signal to this process at a hook, and keeps what a run does."""

    def __init__(self, hook: str = "", step: int = -1, name: str = "SIGTERM") -> None:
        self.when = (hook, step)
        self.name = name
        self.events = []

    def _at(self, hook: str, trainer: L.Trainer) -> None:
        if self.when == (hook, trainer.global_step):
            os.kill(os.getpid(), signal.Signals[self.name])

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._at("train_start", trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._at("batch", trainer)

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._at("validation", trainer)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self.events.append(
            ("validated", trainer.global_step, batch_idx, torch.rand(1).item())
        )  # moves the global stream
        self._at(f"validation {batch_idx}", trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.events.append(("trained", trainer.global_step, torch.rand(1).item()))

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.events.append(("finished", trainer.global_step))


def run(
    folder: Path, *callbacks: L.Callback, ckpt_path: Path | None = None, **settings: Any
) -> list[torch.Tensor]:
    """Six steps of Booster with two validations of two batches each; the final weights."""
    torch.manual_seed(5)
    data = make_data(eval_batch_size=2)
    module = make_module(data=data)
    settings = {
        "limit_val_batches": 1.0,
        "val_check_interval": INTERVAL,
        "check_val_every_n_epoch": None,
    } | settings
    fit(
        module,
        data,
        STEPS,
        ckpt_path and str(ckpt_path),
        default_root_dir=str(folder),
        callbacks=list(callbacks),
        **settings,
    )
    return weights(module)


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def handlers_are_left_as_they_were():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[list[torch.Tensor], list[Any]]:
    """Weights and events of a run that nobody interrupts."""
    recorder = Recorder()
    return run(tmp_path_factory.mktemp("whole"), recorder), recorder.events


@pytest.mark.parametrize(
    ("hook", "step", "saved"),
    [
        ("train_start", 0, None),
        ("batch", 0, 1),
        ("batch", 1, 2),
        ("batch", 2, 3),  # a validation is due: before it
        ("validation", 3, 3),
        ("validation 0", 3, 3),
        ("validation 1", 3, 3),
        ("batch", 3, 4),
        ("batch", 5, 6),  # the last step: its validation is still to be run
        ("validation 0", 6, 6),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(whole, tmp_path, capsys, hook, step, saved):
    first = Recorder(hook, step)
    second = Recorder()
    with pytest.raises(Preempted) as left:
        run(tmp_path, first, Preemption())
    assert left.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, (
        "nothing changes the exit status on the way out"
    )
    message = capsys.readouterr().err
    assert "rank 0: received SIGTERM" in message
    path = tmp_path / "hpc_ckpt_1.ckpt" if saved else None
    assert (
        "finished",
        STEPS,
    ) not in first.events, "callbacks must not take a interrupted run for a finished one"
    if path is None:
        assert "nothing was trained since" in message and not list(tmp_path.glob("hpc*"))
    else:
        assert f"saved step {saved} to {path}" in message and f"--ckpt_path={path}" in message
    resumed = run(tmp_path, second, Preemption(), ckpt_path=path)
    assert same_bits(resumed, whole[0])
    kept = [
        event for event in first.events if event[0] == "trained" or (event[1] < (saved or 0))
    ]  # an interrupted validation is run again
    assert kept + second.events == whole[1], "steps, validations and random numbers"
    assert not list(tmp_path.glob("hpc*")), (
        "the run has finished: no later one resumes from its checkpoint"
    )


def test_a_signal_at_the_last_step_lets_training_finish(tmp_path, capsys):
    recorder = Recorder("batch", STEPS - 1)
    run(tmp_path, recorder, Preemption(), limit_val_batches=0)
    assert recorder.events[-1] == ("finished", STEPS)
    assert "the last step" in capsys.readouterr().err and not list(tmp_path.glob("hpc*"))


def test_only_one_checkpoint_is_kept(tmp_path):
    (tmp_path / "hpc_ckpt_9.ckpt").mkdir()  # of a sharded strategy
    (tmp_path / "hpc_ckpt_10.ckpt").write_text("older")
    (tmp_path / "preempted.ckpt").mkdir()  # of a job that was killed while it wrote
    with pytest.raises(Preempted):
        run(tmp_path, Recorder("batch", 1), Preemption())
    assert [path.name for path in tmp_path.iterdir()] == ["hpc_ckpt_11.ckpt"]


def test_a_failed_write_keeps_the_older_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "hpc_ckpt_1.ckpt").write_text("older")

    def full(_trainer: Any, path: Path, **__: Any) -> None:
        assert "hpc_ckpt_" not in path.name, (
            "Lightning would take what is left of it for a checkpoint"
        )
        path.write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(L.Trainer, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, Recorder("batch", 1), Preemption())
    assert [path.read_text() for path in tmp_path.glob("hpc*")] == ["older"]


# -- being queued again


@pytest.fixture
def scontrol(tmp_path, monkeypatch) -> Path:
    """A SLURM job whose ``scontrol`` writes down its words, and fails if there is a file
    ``refuse``.
    """
    place = tmp_path / "bin"
    place.mkdir()
    (place / "scontrol").write_text(
        f"#!/bin/sh\n[ -e {place}/refuse ] && {{ echo 'slurm_requeue error: no' >&2; exit 1;"
        f" }}\necho $* >> {place}/words\n"
    )
    (place / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    return place


def preempted(folder: Path, *callbacks: L.Callback) -> int:
    with pytest.raises(Preempted) as left:
        run(folder, *callbacks)
    return int(left.value.code)


@pytest.mark.parametrize(
    ("array", "job"),
    [({}, "12"), ({"SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2"}, "10_2")],
)
def test_the_job_is_queued_again(tmp_path, scontrol, monkeypatch, capsys, array, job):
    for name, value in array.items():
        monkeypatch.setenv(name, value)
    assert (
        preempted(tmp_path, Recorder("batch", 1, "SIGUSR1"), Preemption()) == 128 + signal.SIGUSR1
    )
    assert (scontrol / "words").read_text() == f"requeue {job}\n"
    assert (
        "The job is queued again" in capsys.readouterr().err
        and (tmp_path / "hpc_ckpt_1.ckpt").exists()
    )


def test_sigterm_does_not_requeue_a_cancelled_job(tmp_path, scontrol):
    assert preempted(tmp_path, Recorder("batch", 1), Preemption()) == 143
    assert not (scontrol / "words").exists()


def test_a_job_that_cannot_requeue_says_so_by_exit_status(tmp_path, scontrol, monkeypatch, capsys):
    (scontrol / "refuse").touch()
    assert preempted(tmp_path, Recorder("batch", 1, "SIGUSR1"), Preemption()) == TRY_AGAIN
    assert "scontrol requeue 12: slurm_requeue error: no" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert preempted(tmp_path, Recorder("batch", 1, "SIGUSR1"), Preemption()) == TRY_AGAIN
    assert "no scontrol" in capsys.readouterr().err
    monkeypatch.delenv("SLURM_JOB_ID")
    assert preempted(tmp_path, Recorder("batch", 1, "SIGUSR1"), Preemption()) == TRY_AGAIN
    assert "no SLURM job" in capsys.readouterr().err


# -- settings and handlers


def test_other_signals_can_be_chosen(tmp_path, scontrol):
    assert (
        preempted(
            tmp_path,
            Recorder("batch", 1, "SIGINT"),
            Preemption(stop_on=["SIGINT"], requeue_on=["SIGUSR2"]),
        )
        == 130
    )
    assert (
        preempted(
            tmp_path,
            Recorder("batch", 1, "SIGUSR2"),
            Preemption(stop_on=["SIGINT"], requeue_on=["SIGUSR2"]),
        )
        == 128 + signal.SIGUSR2
    )


@pytest.mark.parametrize(
    "settings", [{"stop_on": ["SIGKILL"]}, {"requeue_on": ["USR1"]}, {"every_n_batches": 0}]
)
def test_invalid_settings_are_refused(settings):
    with pytest.raises(TemperError, match=next(iter(settings))):
        Preemption(**settings)


def test_handlers_are_put_back(tmp_path):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    run(tmp_path, Preemption())
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_fit_outside_the_main_thread_installs_no_handlers(tmp_path):
    errors: list[BaseException] = []

    def work() -> None:
        try:
            run(tmp_path, Preemption())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


# -- processes of their own


def wait_for(condition: Any, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, (
            f"it ended, or took more than {seconds} s"
        )
        time.sleep(0.1)


def test_a_terminated_fit_ends_soon_and_says_how_to_resume(tiny_command, tmp_path):
    """Lightning alone ends it with exit status 0 and not a word, so that a finished and a cut-off
    run look the same.
    """
    command = tiny_command(
        "fit", tmp_path, "--trainer.max_steps=100000", "--trainer.val_check_interval=100000"
    )
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        metrics = tmp_path / "metrics.csv"
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
        process.terminate()
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "rank 0: received SIGTERM" in errors and re.search(
        r"saved step \d+ to .*--ckpt_path=.*hpc_ckpt_1.ckpt", errors
    )
    assert "Traceback" not in errors
    assert (tmp_path / "code.json").exists() and not (tmp_path / "card.json").exists()


def two_ranks(folder: Path, *words: object) -> subprocess.CompletedProcess:
    folder.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "tests/callbacks/preemption_worker.py",
        "--out",
        str(folder),
        *map(str, words),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180
    )


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory) -> Callable[[str], list[torch.Tensor]]:
    """Weights of two ranks that nobody interrupts, by strategy."""

    @functools.cache
    def train(strategy: str) -> list[torch.Tensor]:
        folder = tmp_path_factory.mktemp("two")
        done = two_ranks(folder, "--strategy", strategy)
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(folder / "weights.pt")

    return train


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("rank", "name", "status", "strategy"),
    [(0, "SIGTERM", 143, "fsdp2"), (1, "SIGUSR1", TRY_AGAIN, "zero3")],  # ddp: tests/slurm
)
def test_a_signal_to_one_rank_of_two_stops_both(
    whole_of_two, tmp_path, rank, name, status, strategy
):
    done = two_ranks(
        tmp_path, "--strategy", strategy, "--rank", rank, "--step", 3, "--signal", name
    )
    assert done.returncode == status, done.stderr[-3000:]
    assert f"rank {rank}: received {name}" in done.stderr and "saved step 4" in done.stderr
    assert (tmp_path / "hpc_ckpt_1.ckpt").is_dir() is (strategy != "ddp")
    again = two_ranks(tmp_path, "--strategy", strategy, "--ckpt_path", tmp_path / "hpc_ckpt_1.ckpt")
    assert again.returncode == 0, again.stderr[-3000:]
    assert same_bits(torch.load(tmp_path / "weights.pt"), whole_of_two(strategy))
    assert not list(tmp_path.glob("hpc*"))
