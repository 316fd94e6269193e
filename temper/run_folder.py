"""Names of a run folder's files, and atomic writes: a reader never sees half a file.

A file is written under a temporary name and then renamed, so that a symbolic link of its name is
replaced, and what the link names is not written to.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from temper.errors import TemperError

EVALUATION = "evaluation.json"
GENERATIONS = "generations.jsonl"
ANSWERS = "answers.jsonl"
JUDGED = "judged.json"  # what the judgements of a study's stage were made of
CARD = "card.json"
# In checkpoints/: written where an export fails and no checkpoint has the weights of the last step.
UNEXPORTED = "unexported.ckpt"


def write_text(path: Path, text: str) -> None:
    """Write a text file with its folders, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    with partial.open("x", encoding="utf-8") as file:  # x: through no link
        file.write(text)
    os.replace(partial, path)


def open_lock(folder: Path) -> TextIO:
    """Open a folder's ``.lock``, making both where they are missing; nothing is written to it.

    Raises:
        TemperError: it is a symbolic link, which is not followed, or cannot be opened.
    """
    path = folder / ".lock"
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.fdopen(os.open(path, flags, 0o666), "r+")
    except OSError as error:
        reason = "a symbolic link" if path.is_symlink() else error.strerror
        raise TemperError(
            f"{path} cannot be opened ({reason}), and it keeps two processes from writing to one"
            " folder; delete it, or give another folder"
        ) from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an indented JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, whole or not at all."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
