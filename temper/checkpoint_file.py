"""Writing and reading one file of tensors: a whole checkpoint, or one file of a sharded one.

A file is complete or absent, never half written. It is read with ``weights_only=True``: it holds
tensors and plain values, so reading one from a stranger cannot run code.
"""

import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from temper.errors import TemperError


def save_file(content: Any, path: Path) -> None:
    """Write a complete file or none; an earlier one stays until the new one is complete.

    Raises:
        TemperError: it could not be written (a full disk, a quota, no permission).
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:  # x: through no link
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where the disk is full
        partial.unlink(missing_ok=True)
        raise TemperError(_write_error(path, error)) from error


def _write_error(path: Path, error: Exception) -> str:
    folder = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(folder).free / 2**20
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    return (
        f"checkpoint {path} could not be written ({_first_line(cause)}); {free:.0f} MiB are"
        " free there, and an earlier checkpoint of that name is unchanged: free some space, or set"
        " trainer.default_root_dir to another disk"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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
        # torch explains over several lines what one may do; the last one names the function.
        reason = (str(error).splitlines() or ["no reason given"])[-1].strip()
        raise TemperError(
            f"ckpt_path={path}: refused, since it holds more than tensors and plain values, and"
            f" reading that can run any code ({reason}); give a checkpoint that Temper wrote"
        ) from error
    except OSError as error:
        raise TemperError(
            f"ckpt_path={path}: cannot be read ({error.strerror or error})"
        ) from error
    except Exception as error:  # torch's reader fails in a dozen ways on bytes that are not its own
        raise TemperError(
            f"ckpt_path={path}: not a checkpoint, or a damaged one ({_first_line(error)})"
        ) from error


# Settings that Lightning stores in a checkpoint and would merge over the command line: they could
# name any class, and allow a model folder's code. A run's settings are those of its config.
SETTINGS = (
    "hyper_parameters",
    "hparams_name",
    "hparams_type",
    "datamodule_hyper_parameters",
    "datamodule_hparams_name",
    "datamodule_hparams_type",
)
OURS = "network."  # where an objective's weights begin


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read the single-file checkpoint of a run, without the settings that it may hold.

    Raises:
        TemperError: it is missing, damaged, unsafe, or no checkpoint of an objective.
    """
    content = load_file(path)
    reason = _mismatch(content)
    if reason:
        raise TemperError(
            f"ckpt_path={path}: not a checkpoint of a Temper run ({reason}); give one that a fit"
            " wrote, or start from a model folder with model.network.path"
        )
    return {key: value for key, value in content.items() if key not in SETTINGS}


def _mismatch(content: Any) -> str:
    """In what a file's content differs from a checkpoint of an objective; empty if in nothing."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}"
    weights = content.get("state_dict")
    if not isinstance(weights, dict):
        return "it has no state_dict"
    if not isinstance(content.get("global_step"), int):
        return "it has no global_step"
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            return f"the weight {name!r} is no tensor"
        if not str(name).startswith(OURS):
            return f"the weight {name!r} is not below {OURS!r}"
    return ""


def check_weights(path: str | Path, saved: Mapping[str, Tensor], network: nn.Module) -> None:
    """Refuse weights of another network, by names and shapes.

    Args:
        path: The checkpoint, for the message.
        saved: Weights by their names in the network; those that are not trained may be left out.
        network: The network that is going to have them.

    Raises:
        TemperError: a trained weight is missing, has another shape, or the network does not have
            it.
    """
    known = network.state_dict()
    for name, value in saved.items():
        if name in known:
            shapes = [tuple(each.shape) for each in (value, known[name])]
            # A quantized weight is packed once it is on its device.
            if shapes[0] != shapes[1] and torch.uint8 not in (value.dtype, known[name].dtype):
                _refuse_weights(path, f"{name!r} is {shapes[0]} and should be {shapes[1]}")
        elif not any(name.startswith(f"{each}.") for each in known):  # state of a quantized weight
            _refuse_weights(path, f"the network has no {name!r}")
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and name not in saved:
            _refuse_weights(path, f"it has no {name!r}, which is trained")


def _refuse_weights(path: str | Path, reason: str) -> None:
    raise TemperError(
        f"ckpt_path={path}: not a checkpoint of this network ({reason}); give the config.yaml of"
        " the same run"
    )
