"""The run folder from its first moment on: held by one process, with the config and the code that
the run was started with. A job that dies has them too.
"""

import fcntl
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, TextIO

import lightning.pytorch as L
from lightning.pytorch.cli import SaveConfigCallback

from temper.run_folder import open_lock, write_json, write_text
from temper.slurm import is_first_process

# -- the code

ROOT = Path(__file__).parents[2]
UNTRACKED = (".py", ".yaml", ".toml", ".sh")  # new files that count as code; data never do

SLURM = (
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_JOB_NODELIST",
    "SLURM_RESTART_COUNT",
)


def write_snapshot(folder: Path) -> None:
    """Write ``code.json`` (command, commit, versions of all packages) and ``code.diff`` (changes
    since that commit).
    """
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
    new = [
        name
        for name in _git("ls-files", "--others", "--exclude-standard").splitlines()
        if name.endswith(UNTRACKED)
    ]
    with tempfile.TemporaryDirectory() as place:
        index = {"GIT_INDEX_FILE": f"{place}/index"}
        _git("read-tree", "HEAD", **index)
        if new:
            _git("add", "--intent-to-add", "--", *new, **index)
        return _git("diff", "HEAD", **index)


def _git(*words: str, **environment: str) -> str:
    """Output of a git command; empty without git, or outside a repository."""
    try:
        done = subprocess.run(
            ("git", "-C", str(ROOT), *words),
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
            env=os.environ | environment,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout


# -- the config


class SaveConfig(SaveConfigCallback):
    """Write ``config.yaml``; a different one already there is kept as ``config.1.yaml``, and so on.

    Lightning's callback refuses to start when the file exists, which ends a requeued job.
    """

    def __init__(self, parser: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(parser, config, **(kwargs | {"overwrite": True, "save_to_log_dir": False}))

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save on the first rank; validation and test keep theirs beside the training's."""
        folder = Path(trainer.default_root_dir)
        name = "config" if stage == "fit" else f"config_{getattr(stage, 'value', stage)}"
        text = as_saved(self.parser, self.config)
        target = folder / f"{name}.yaml"
        if target.exists() and target.read_text() != text:
            number = 1
            while (folder / f"{name}.{number}.yaml").exists():
                number += 1
            target.rename(folder / f"{name}.{number}.yaml")
        write_text(target, text)
        if stage == "fit":
            write_snapshot(folder)


def as_saved(parser: Any, config: Any) -> str:
    """The text of a verb's ``config.yaml``.

    Arguments of the verb that were not given would keep other verbs from reading the file:
    `preview`, `export`.
    """
    config = config.clone()
    for argument in ("ckpt_path", "weights_only"):
        if config.get(argument) is None:
            config.pop(argument, None)
    return str(parser.dump(config, skip_none=False))


# -- one process per run folder


def hold_run_folder(folder: str | Path) -> TextIO | None:
    """Wait until no other process writes to the folder, then keep it until this process ends.

    A stage whose scheduler was killed goes on by itself; the stage that replaces it must not write
    between its lines. Ranks above 0 write nothing and do not wait. On file systems without locks
    nothing is held.

    Returns:
        The open lock file, which holds the folder until it is closed; None if nothing is held.

    Raises:
        TemperError: the folder or the lock file cannot be opened.
    """
    if not is_first_process():
        return None
    lock = open_lock(Path(folder))
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"{folder} is in use by another process; waiting for it to end",
                file=sys.stderr,
                flush=True,
            )
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        lock.close()
        return None
    return lock
