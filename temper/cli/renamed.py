"""Names of earlier versions in configs and commands, and what they are now.

A class path of a saved ``config.yaml`` is translated when the file is read, with one printed line.
A config file or an option that moved is refused, and the error says what to use instead. The table
in CHANGELOG.md, under "Renamed", is `as_markdown`.
"""

import functools
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from temper.slurm import is_first_process


@dataclass(frozen=True)
class Renamed:
    """One name that changed.

    Attributes:
        old: The name that earlier versions had.
        new: What is given now.
    """

    old: str
    new: str


# Import paths of classes that a config can name.
CLASSES = (
    Renamed(
        "lightning_modules.safe_instruct.SafeInstructModule",
        "lightning_modules.SafeInstructModule",
    ),
    Renamed("temper.cli.AtomicCheckpointIO", "temper.cli.checkpoint_io.AtomicCheckpointIO"),
    Renamed("temper.cli.BackgroundCheckpointIO", "temper.cli.checkpoint_io.BackgroundCheckpointIO"),
    Renamed("temper.judges.guard.GuardLM", "temper.judges.GuardLM"),
    Renamed("temper.judges.yes_no.YesNoLM", "temper.judges.YesNoLM"),
    Renamed("temper.models.spec.LoRASpec", "temper.models.LoRASpec"),
    Renamed("temper.models.spec.NetworkSpec", "temper.models.NetworkSpec"),
    Renamed("temper.models.spec.ShapeSpec", "temper.models.ShapeSpec"),
)
# Config files, from the folder of the project.
CONFIGS = (
    Renamed("configs/objective/booster_paper.yaml", "configs/objective/booster.yaml"),
    *(
        Renamed(
            f"configs/experiment/{objective}_{model}.yaml",
            f"configs/experiment/{objective}.yaml with configs/model/{model}.yaml",
        )
        for objective in ("booster", "dpo", "npo", "sft")
        for model in ("llama2_7b", "llama3_8b")
    ),
)
# Arguments of a class that are others, or those of another class, now: ``Class.argument``.
OPTIONS = (
    *(
        Renamed(
            f"BoosterModule.{option}",
            f"HeldBoosterModule.{option} with configs/objective/held_booster.yaml",
        )
        for option in ("refresh_every", "reduction_floor")
    ),
    Renamed(
        "DPOModule.beta_unsafe",
        "DPOModule.beta_rejected with configs/objective/dpo_mechanistic.yaml",
    ),
)
COMMANDS = (
    Renamed("python -m temper.models.fetch", "python -m tools.fetch_model"),
    Renamed("python -m temper.report.build", "temper report"),
    Renamed("python -m temper.proxy --max-new-tokens", "temper proxy --max_new_tokens"),
)


def translated(value: Any) -> Any:
    """A config value with every old class path in it replaced, each with one printed line.

    Args:
        value: What a YAML loader returns: dicts, lists and plain values.
    """
    if isinstance(value, dict):
        return {key: translated(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [translated(inner) for inner in value]
    for renamed in CLASSES:
        if value == renamed.old:
            _say(f"{renamed.old} is {renamed.new} now; reading it as that")
            return renamed.new
    return value


def moved_class(path: str) -> str | None:
    """Message with the new path of a renamed class; None for any other path."""
    for renamed in CLASSES:
        if path == renamed.old:
            return f"{path} was renamed; give {renamed.new}"
    return None


def moved_config(path: str) -> str | None:
    """Message with the new name of a renamed config file; None for any other file.

    Args:
        path: A file that does not exist, from the current folder.
    """
    for renamed in CONFIGS:
        if PurePath(path).match(renamed.old):
            return f"this file was replaced; give {renamed.new}"
    return None


def moved_option(name: str, classes: Collection[str]) -> str | None:
    """Message with the new place of a moved option; None for any other option.

    Args:
        name: The option, with or without the keys before it.
        classes: Names of the classes that the option was given to.
    """
    last = name.rpartition(".")[2]
    for renamed in OPTIONS:
        kind, _, option = renamed.old.partition(".")
        if option == last and kind in classes:
            return f"option {option!r} of {kind} was moved; give {renamed.new}"
    return None


def as_markdown() -> str:
    """All renamed names as a Markdown table."""
    rows = [
        f"| `{renamed.old}` | {_code(renamed.new)} |"
        for table in (CLASSES, OPTIONS, CONFIGS, COMMANDS)
        for renamed in table
    ]
    return "\n".join(["| before | now |", "| -- | -- |", *rows]) + "\n"


def _code(new: str) -> str:
    """A new name with its files and names as code, and the words between them as text."""
    return " with ".join(f"`{part}`" for part in new.split(" with "))


@functools.cache  # a value is loaded several times while it is parsed
def _say(line: str) -> None:
    if is_first_process():
        print(f"note: {line}", file=sys.stderr)
