"""Checkpoints and their configs: which file a command means, and whether it belongs to the config.

Every checkpoint carries the settings that it was trained with. They are compared with the config
that is to read it, by whichever verb, and set nothing.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from temper.checkpoint_file import load_checkpoint, load_file
from temper.cli.loggers import DEFAULT_ROOT
from temper.cli.renamed import translated
from temper.errors import TemperError
from temper.run_folder import UNEXPORTED
from temper.sharded_checkpoint import COMMON, ShardedCheckpoint, is_sharded
from temper.slurm import preempted_checkpoints

TRAINED = ("model", "data", "seed_everything")  # keys of a config that a checkpoint belongs to
# Settings that may differ when a checkpoint is used: they change memory, speed or the evaluation.
FREE = {
    "model.init_args": (
        "micro_batch_size",
        "packing",
        "fused_loss",
        "max_new_tokens",
        "max_skipped_steps",
    ),
    "model.init_args.network": (
        "local_files_only",
        "trust_remote_code",
        "attention",
        "activation_checkpointing",
        "compile",
    ),
    "data.init_args": (
        "judge",
        "eval_layout",
        "n_eval",
        "eval_batch_size",
        "num_workers",
        "max_new_tokens",
        "overlap",
        "trust_remote_code",
    ),
}
_FREE = tuple(f"{place}.{name}." for place, names in FREE.items() for name in names)
# What an evaluation or an export needs of a checkpoint: the objective and its network.
NETWORK = ("model.class_path", "model.init_args.network")
SETTINGS = "settings"  # key of a checkpoint with those of its run
# Needed to resume; a file saved with ``save_weights_only`` has neither.
TO_RESUME = ("optimizer_states", "ranks")
CONFIG = "config.yaml"
NAMES = ("last", "hpc", "best")  # that Lightning takes for a path
LAST = f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}{ModelCheckpoint.FILE_EXTENSION}"

# -- which file


def run_of(config: Any, files: Iterable[str] = ()) -> Path:
    """The run that a command is about: that of a ``config.yaml`` among its files, beside which a
    fit left its ``code.json``; otherwise the run folder of the config.
    """
    for file in map(Path, files):
        if file.name == CONFIG and (file.parent / "code.json").is_file():
            return file.parent
    return Path(config.trainer.default_root_dir or DEFAULT_ROOT)


def named_checkpoint(path: str, config: Any, run: Path) -> str:
    """The file that ``ckpt_path`` means: ``last`` and ``hpc`` stand for one of a run.

    Raises:
        TemperError: there is none; or the name means something in a running fit alone.
    """
    if path == "best" or path.startswith("registry"):
        raise TemperError(
            f"ckpt_path={path}: not supported, since a new process knows no such checkpoint; give"
            " its file, or last"
        )
    if path not in NAMES:
        if "://" not in path and not Path(path).exists():
            raise TemperError(
                f"ckpt_path={path}: no such checkpoint; give one that exists, or drop the flag to"
                " start from the beginning"
            )
        return path
    left = preempted_checkpoints(run)[-1:]
    found = left if path == "hpc" else [*left, *_last_checkpoints(config, run)]
    if not found:
        raise TemperError(
            f"ckpt_path={path}: no {LAST if path == 'last' else 'hpc_ckpt_<n>.ckpt'} of this run in"
            f" {run}; give the file, or drop the flag to start from the beginning"
        )
    return str(max(found, key=lambda file: file.stat().st_mtime_ns))


def _last_checkpoints(config: Any, run: Path) -> list[Path]:
    """Every ``last.ckpt`` where a run's `ModelCheckpoint` callbacks write one, and that of a run
    whose export failed.
    """
    given = [arguments.get("dirpath") for _, arguments in _callbacks(config)]
    folders = [run / "checkpoints", *(Path(folder) for folder in given if folder)]
    found = [*(folder / LAST for folder in folders), folders[0] / UNEXPORTED]
    return [path for path in found if path.exists()]


def _callbacks(config: Any) -> Iterator[tuple[str, Any]]:
    """Class path and arguments of every callback of a config."""
    callbacks = config.trainer.callbacks or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        yield str(callback.get("class_path", "")), callback.get("init_args") or {}


# -- what is in it


def check_checkpoint(path: str | None, verb: str) -> dict[str, Any]:
    """Refuse a file that is no checkpoint, or an unsafe one, before it is used.

    Args:
        path: A file or a folder; None, and remote paths, pass.
        verb: Verb that is going to read it.

    Returns:
        The content, without the weights of a sharded one; empty where nothing is read.

    Raises:
        TemperError: reading it would call functions that a file names; it is missing, damaged or of
            another program; or it holds weights alone, and a fit is to resume from it.
    """
    if path is None:
        return {}
    if is_sharded(path):
        content: dict[str, Any] = load_file(Path(path) / COMMON)
        ShardedCheckpoint(Path(path))
        return content
    if Path(path).is_dir():
        raise TemperError(
            f"ckpt_path={path}: a folder, and not a sharded checkpoint (no {COMMON} in it); for a"
            " model folder, give model.network.path"
        )
    if not Path(path).is_file():
        return {}
    content = load_checkpoint(Path(path))
    missing = [key for key in TO_RESUME if key not in content]
    if verb == "fit" and missing:
        raise TemperError(
            f"ckpt_path={path}: it has no {missing[0]}, so a fit cannot resume from it;"
            " evaluate or export it, or give a checkpoint that was saved with them"
        )
    return content


# -- whether it belongs to a config


def trained_settings(config_yaml: str) -> dict[str, Any]:
    """The part of a config that a checkpoint belongs to; old class paths are translated. Of a text
    that is no config, nothing.
    """
    try:
        content = translated(yaml.safe_load(config_yaml))
    except yaml.YAMLError:
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: content[key] for key in TRAINED if content.get(key) is not None}


def check_belongs(
    what: str, then: dict[str, Any], now: dict[str, Any], verb: str, way_out: str
) -> None:
    """Refuse a checkpoint of another training.

    A fit resumes only what it would have trained itself: another learning rate, for example, would
    be overwritten by the optimizer's stored one. An evaluation and an export need the objective and
    the network. Settings that the checkpoint does not know are new since, and pass.

    Args:
        what: The checkpoint, for the message.
        then: Its settings, from `trained_settings`.
        now: Those of the config.
        verb: Verb that is going to read it.
        way_out: What to do, for the message.

    Raises:
        TemperError: the first setting that differs, with both values.
    """
    for name, before, after in _differences("", then, now):
        if f"{name}.".startswith(_FREE) or (verb != "fit" and not name.startswith(NETWORK)):
            continue
        short = name.replace(".init_args", "")
        raise TemperError(
            f"{what} was trained with {short}={_shown(before)}, and the config has {_shown(after)};"
            f" {way_out}"
        )


def _differences(name: str, then: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key, value in then.items():
            yield from _differences(f"{name}.{key}".lstrip("."), value, now.get(key))
    elif not _same(then, now):
        yield name, then, now


def _same(then: Any, now: Any) -> bool:
    """Whether two values are the same, the same number, or paths of one folder."""
    if then == now:
        return True
    if isinstance(then, str) and isinstance(now, str) and os.path.exists(then):
        return os.path.realpath(then) == os.path.realpath(now)
    try:  # 1e-08 is a text to PyYAML, and a number to the command line
        return not isinstance(then, bool) and float(then) == float(now)
    except (TypeError, ValueError):
        return False


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


# -- what an evaluation of a run evaluates


def is_of(run: Path, now: dict[str, Any]) -> bool:
    """Whether a run folder is that of a fit with these settings of objective and network."""
    saved = run / CONFIG
    if not saved.is_file():
        return False
    then = trained_settings(saved.read_text(encoding="utf-8"))
    try:
        check_belongs("", then, now, "validate", "")
    except TemperError:
        return False
    return "model" in then


def use_trained(config: Any, verb: str, run: Path) -> str:
    """Let an evaluation of a run, by its own config, have the weights that the run ended with: its
    export, or else its last checkpoint.

    Args:
        config: The verb's config; changed in place.
        verb: ``validate``, ``test``, ``predict`` or ``export``, which takes the checkpoint only.
        run: The run folder.

    Returns:
        What is evaluated, for a line to print.

    Raises:
        TemperError: the run left neither.
    """
    export = _export_folder(config, run)
    network = (config.model.get("init_args") or {}).get("network")
    if verb != "export" and network is not None and _is_of_last_fit(export, run):
        changes: dict[str, Any] = {"path": str(export), "revision": None, "shape": None}
        changes |= {"lora": None, "adapter": "continue"}
        if not (export / "adapter_config.json").is_file():
            changes["quantization"] = None  # the exported weights are not
        for name, value in changes.items():
            network[name] = value
        arguments = config.model.init_args
        if arguments.get("reference") == "adapter_off":
            arguments["reference"] = "auto"  # read by a fit alone; the new adapter is in the export
        return f"the export of this run, {export}"
    found = [*_last_checkpoints(config, run), *preempted_checkpoints(run)[-1:]]
    if found:
        config.ckpt_path = str(max(found, key=lambda file: file.stat().st_mtime_ns))
        return f"the last checkpoint of this run, {config.ckpt_path}"
    none = "neither an export nor a checkpoint"
    if verb == "export":
        none = f"no checkpoint; its export is {export}" if export.is_dir() else "no checkpoint"
    raise TemperError(
        f"{run / CONFIG} is the config of a fit that left {none}; give --ckpt_path or"
        " --model.network.path, or, to take the network as it was before training, another"
        " --trainer.default_root_dir and the configs that the fit was given"
    )


def _export_folder(config: Any, run: Path) -> Path:
    """Where the config's `HFExport` writes."""
    for path, arguments in _callbacks(config):
        if path.endswith("HFExport"):
            return run / (arguments.get("folder") or "export")
    return run / "export"


def _is_of_last_fit(export: Path, run: Path) -> bool:
    """Whether an export is complete, and no later fit has begun in the run folder since."""
    if not any((export / name).is_file() for name in ("config.json", "adapter_config.json")):
        return False
    begun = run / "code.json"
    return not begun.is_file() or export.stat().st_mtime_ns >= begun.stat().st_mtime_ns
