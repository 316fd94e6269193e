"""One process per run folder."""

import fcntl
import os
import sys
from pathlib import Path
from typing import TextIO


def hold_run_folder(folder: str | Path) -> TextIO | None:
    """Wait until no other process writes to the folder, then keep it until this process ends.

    A stage whose scheduler was killed goes on by itself; the stage that replaces it must not write
    between its lines. Ranks above 0 write nothing and do not wait; file systems without locks are
    taken as they are.
    """
    if any(int(os.environ.get(name, "0")) > 0 for name in ("LOCAL_RANK", "SLURM_PROCID", "RANK")):
        return None
    path = Path(folder) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path, "w")  # noqa: SIM115  held until the process ends
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder} is in use by another process; waiting for it to end", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        lock.close()
        return None
    return lock
