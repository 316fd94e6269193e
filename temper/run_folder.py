"""Files of a run folder, written so that a reader never meets half of one."""

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
    """Write a whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def replace_folder(folder: Path, staging: Path, old: Path) -> None:
    """Give a complete folder the name of another one: two renames, and no moment with half a folder
    under it.

    Args:
        folder: The name; what has it now, if anything, moves to ``old`` and stays there.
        staging: What takes its place, on the same file system.
        old: Does not exist.
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
    """Write a JSON file a person can read."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
