"""Names of a run folder's files, and atomic writes: a reader never sees half a file."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

EVALUATION = "evaluation.json"
GENERATIONS = "generations.jsonl"
ANSWERS = "answers.jsonl"
JUDGED = "judged.json"  # what the judgements of a study's stage were made of
CARD = "card.json"


def write_text(path: Path, text: str) -> None:
    """Write a text file with its folders, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def replace_folder(folder: Path, staging: Path, old: Path) -> None:
    """Replace a folder by a complete one with two renames, so that it is never there in half.

    Args:
        folder: The folder to replace; if it exists, it moves to ``old`` and stays there.
        staging: The complete folder, on the same file system; it gets the name ``folder``.
        old: A name that does not exist yet.

    Raises:
        OSError: a rename failed; ``folder`` is as it was.
    """
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(staging, folder)
    except BaseException:
        if old.exists():
            os.replace(old, folder)
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an indented JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, whole or not at all."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
