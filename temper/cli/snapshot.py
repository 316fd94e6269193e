"""What code a run was started with, written before the first step: a job that dies has it too."""

import os
import platform
import shlex
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

from temper.run_folder import write_json, write_text

ROOT = Path(__file__).parents[2]
UNTRACKED = (".py", ".yaml", ".toml", ".sh")  # new files that count as code; data never do

SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT")


def write_snapshot(folder: Path) -> None:
    """Write ``code.json`` (command, commit, versions of all packages) and ``code.diff`` (what differs from that commit)."""
    commit = _git("rev-parse", "HEAD").strip() if _git("ls-files", "temper/cli/snapshot.py") else ""
    difference = _difference() if commit else ""
    content = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": commit or "not a git checkout",
        "differs": bool(difference),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _packages(),
        "slurm": {name: os.environ[name] for name in SLURM if name in os.environ},
    }
    write_json(folder / "code.json", content)
    if difference:
        write_text(folder / "code.diff", difference)
    else:
        (folder / "code.diff").unlink(missing_ok=True)


@cache
def _packages() -> dict[str, str]:
    return dict(sorted({each.name: each.version for each in distributions()}.items()))


def _difference() -> str:
    """``git diff HEAD`` with new code files in it, leaving the checkout's own index as it is."""
    new = [name for name in _git("ls-files", "--others", "--exclude-standard").splitlines() if name.endswith(UNTRACKED)]
    with tempfile.TemporaryDirectory() as place:
        index = {"GIT_INDEX_FILE": f"{place}/index"}
        _git("read-tree", "HEAD", **index)
        if new:
            _git("add", "--intent-to-add", "--", *new, **index)
        return _git("diff", "HEAD", **index)


def _git(*words: str, **environment: str) -> str:
    """What git says; nothing if there is no git, or no repository."""
    try:
        done = subprocess.run(
            ("git", "-C", str(ROOT), *words), capture_output=True, text=True, errors="replace", check=True, env=os.environ | environment
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout
