"""What a process can know of the SLURM job that it runs in, and the checkpoints that preempted jobs
leave.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

_PREEMPTED = re.compile(r"hpc_ckpt_(\d+)\.ckpt")  # the name that Lightning looks for


def in_job() -> bool:
    """Whether SLURM says how many processes there are; not in a job of the name ``bash`` or
    ``interactive``.
    """
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in (
        "bash",
        "interactive",
    )


def job_name() -> str | None:
    """What ``scontrol`` calls this job: ``12``, or ``12_3`` for a task of an array; None outside of
    one.
    """
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def requeue() -> str:
    """Queue this job again, which also ends it.

    Returns:
        Why that was not possible; nothing if it was.
    """
    job = job_name()
    if job is None:
        return "this is no SLURM job"
    try:
        done = subprocess.run(
            ("scontrol", "requeue", job), capture_output=True, text=True, timeout=60
        )
    except FileNotFoundError:
        return "there is no scontrol here (a container?)"
    except subprocess.TimeoutExpired:
        return f"scontrol requeue {job} did not answer"
    return (
        "" if done.returncode == 0 else f"scontrol requeue {job}: {' '.join(done.stderr.split())}"
    )


def what_next(problem: str | None, checkpoint: Path | None) -> str:
    """How a preempted run goes on, in a sentence or two.

    Args:
        problem: What `requeue` said; None if it was not asked to.
        checkpoint: What the run can go on from, if there is anything.
    """
    if problem == "":
        return "The job is queued again and goes on from there"
    queued = (
        f"Not queued again: {problem}; the exit status, 75, asks a batch script to do it. "
        if problem
        else ""
    )
    if in_job():
        return f"{queued}Stopping; the same job, submitted again, goes on from there"
    return f"{queued}Stopping; to go on, run the same command" + (
        f" with --ckpt_path={checkpoint}" if checkpoint else ""
    )


def preempted_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints that preemptions left in a run folder, oldest first; files or, of a sharded
    strategy, folders.
    """
    found = [
        (int(match[1]), path)
        for path in Path(folder).glob("hpc_ckpt_*")
        if (match := _PREEMPTED.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def next_checkpoint(folder: str | Path) -> Path:
    """Where the next preemption saves."""
    last = preempted_checkpoints(folder)
    number = int(_PREEMPTED.fullmatch(last[-1].name)[1]) if last else 0  # type: ignore[index]
    return Path(folder) / f"hpc_ckpt_{number + 1}.ckpt"


def remove(checkpoints: Iterable[Path]) -> None:
    """Delete checkpoints, files or folders."""
    for path in checkpoints:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
