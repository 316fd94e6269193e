"""The SLURM job that a process runs in, requeueing it, and the checkpoints of preempted jobs."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

_PREEMPTED = re.compile(r"hpc_ckpt_(\d+)\.ckpt")  # the name that Lightning looks for

# -- the job


def is_first_process() -> bool:
    """Whether this is the first of a run's processes, from the environment of its launcher."""
    ranks = (os.environ.get(name, "0") for name in ("LOCAL_RANK", "SLURM_PROCID", "RANK"))
    return all(int(rank) == 0 for rank in ranks)


def in_job() -> bool:
    """Whether SLURM sets the number of processes; false in a job named ``bash`` or ``interactive``,
    as in Lightning.
    """
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in (
        "bash",
        "interactive",
    )


def job_name() -> str | None:
    """The job's name for ``scontrol``: ``12``, or ``12_3`` for a task of an array; None outside of
    a job.
    """
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def requeue() -> str:
    """Queue this job again, which also ends it.

    Returns:
        The reason why that was not possible; empty if it was.
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
    if done.returncode:
        return f"scontrol requeue {job}: {' '.join(done.stderr.split())}"
    return ""


def what_next(problem: str | None, checkpoint: Path | None) -> str:
    """How a preempted run is resumed, in a sentence or two.

    Args:
        problem: What `requeue` returned; None if it was not called.
        checkpoint: The checkpoint to resume from, if there is one.
    """
    if problem == "":
        return "The job is queued again and resumes from there"
    queued = ""
    if problem:
        queued = f"Not queued again: {problem}; the exit status, 75, asks a batch script to do it. "
    if in_job():
        return f"{queued}Stopping; submit the same job again to resume from there"
    flag = f" with --ckpt_path={checkpoint}" if checkpoint else ""
    return f"{queued}Stopping; to resume, run the same command{flag}"


# -- checkpoints of preempted jobs


def preempted_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints that preemptions left in a run folder, oldest first; files or, of a sharded
    strategy, folders.
    """
    return [path for _, path in sorted(_numbered(folder))]


def _numbered(folder: str | Path) -> Iterator[tuple[int, Path]]:
    for path in Path(folder).glob("hpc_ckpt_*"):
        if match := _PREEMPTED.fullmatch(path.name):
            yield int(match[1]), path


def next_checkpoint(folder: str | Path) -> Path:
    """Where the next preemption saves."""
    numbers = [number for number, _ in _numbered(folder)]
    return Path(folder) / f"hpc_ckpt_{max(numbers, default=0) + 1}.ckpt"
