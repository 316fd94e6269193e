"""Writing and reading one file of tensors: a whole checkpoint, or one file of a sharded one.

A file is complete or absent, never half written. It is read with ``weights_only=True``: it holds
tensors and plain values, so reading one from a stranger cannot run code.
"""

import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from temper.errors import TemperError


def save_file(content: Any, path: Path) -> None:
    """Write a complete file or none; an earlier one stays until the new one is complete.

    Raises:
        TemperError: it could not be written (a full disk, a quota, no permission).
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where the disk is full
        partial.unlink(missing_ok=True)
        raise TemperError(_write_error(path, error)) from error


def _write_error(path: Path, error: Exception) -> str:
    folder = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(folder).free / 2**20
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    return (
        f"checkpoint {path} could not be written ({str(cause).splitlines()[0]}); {free:.0f} MiB are"
        " free there, and an earlier checkpoint of that name is unchanged: free some space, or set"
        " trainer.default_root_dir to another disk"
    )


def load_file(path: Path) -> Any:
    """Read a file of tensors and plain values; tensors are mapped from disk.

    Raises:
        TemperError: it is missing or damaged, or reading it would call functions that it names.
    """
    try:
        return torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except FileNotFoundError:
        raise TemperError(
            f"ckpt_path={path.parent}: {path.name} is missing; the checkpoint is not complete"
        ) from None
    except pickle.UnpicklingError as error:
        raise TemperError(
            f"ckpt_path={path}: refused, since it holds more than tensors and plain values, and"
            f" reading that can run any code ({str(error).splitlines()[-1].strip()}); give a"
            " checkpoint that Temper wrote"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise TemperError(
            f"ckpt_path={path}: not a checkpoint, or a damaged one ({str(error).splitlines()[0]})"
        ) from error
