"""Rows of tokens in memory-mapped files: written once, limited by the disk and not by memory, read
row by row.

Shapes: `B` requested rows, `n` rows in a pool, `K` sequences in a row.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from temper.data.pool import Index, row_numbers
from temper.data.rows import Batch
from temper.errors import TemperError
from temper.losses import IGNORE_INDEX
from temper.output_folder import is_regular, list_files, replace_folder, resolve_target

ABOUT = "pool.json"
TYPES = {
    "tokens": np.int32,
    "trained": np.uint8,
    "offsets": np.int64,
}  # files of a pool; flags are uint8 like `trained`
VERSION = 1  # of the files; others are written anew


@dataclass
class Row:
    """A row before it is part of a pool.

    Args:
        ids: Token ids of its K sequences.
        trained: Of every token of them, whether it has a label.
        flags: Other properties of the row, by name.
    """

    ids: list[list[int]]
    trained: list[list[bool]]
    flags: Mapping[str, bool] = field(default_factory=dict)


class TokenPool:
    """Rows of different lengths in memory-mapped files, read when a batch needs them.

    `write_pool` makes the folder.

    Args:
        folder: Folder of the pool.
        verify: Compare the SHA-256 of every file with the recorded one. This reads the whole pool,
            so a run does it once: where this run wrote the files, or another process of it on this
            machine verified them, it need not be done again.

    Attributes:
        about: What `write_pool` was told about the rows.

    Raises:
        OSError, ValueError, KeyError: files are missing or damaged.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.folder = folder
        head = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if head["version"] != VERSION:
            raise ValueError(f"{folder}: version {head['version']}")
        self._n: int = head["rows"]
        self._k: int = head["sequences"]
        self.about: dict[str, Any] = head["about"]
        self._digests: dict[str, str] = head["sha256"]
        self._files = {
            name: _map(folder / name, TYPES.get(name, np.uint8)) for name in self._digests
        }
        if len(self._files["offsets"]) != self._n * self._k + 1:
            raise ValueError(f"{folder}: offsets of other rows")
        n_tokens = int(self._files["offsets"][-1])
        if any(len(self._files[name]) != n_tokens for name in ("tokens", "trained")):
            raise ValueError(f"{folder}: tokens of other rows")
        if verify:
            for name, digest in self._digests.items():
                if _sha256(folder / name) != digest:
                    raise ValueError(f"{folder / name}: damaged")

    def __reduce__(self) -> tuple[Any, ...]:
        # A loader process maps the files itself; the process that sends them has verified them.
        return TokenPool, (self.folder, False)

    @property
    def lengths(self) -> np.ndarray:
        """See `Pool`."""
        lengths_n = np.diff(self._files["offsets"]).astype(np.int32)
        return lengths_n if self._k == 1 else lengths_n.reshape(self._n, self._k)

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: Index) -> Batch:
        numbers_B = row_numbers(self._n, index)
        sequences = (numbers_B[:, None] * self._k + np.arange(self._k)).flatten()
        begins = self._files["offsets"][sequences]
        ends = self._files["offsets"][sequences + 1]
        lengths = ends - begins
        shape = (len(sequences), int(lengths.max(initial=0)))
        ids = np.full(shape, self.about["pad_id"], np.int64)
        labels = np.full(shape, IGNORE_INDEX, np.int64)
        for at, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            tokens = self._files["tokens"][begin:end]
            ids[at, : end - begin] = tokens
            labels[at, : end - begin] = np.where(
                self._files["trained"][begin:end], tokens, IGNORE_INDEX
            )
        present = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
        leading = (len(numbers_B),) if self._k == 1 else (len(numbers_B), self._k)
        padded = {"input_ids": ids, "attention_mask": present, "labels": labels}
        flags = {
            name: torch.from_numpy(self._files[name][numbers_B] != 0)
            for name in self._digests
            if name not in TYPES
        }
        rows = {
            name: torch.from_numpy(array.reshape(*leading, -1)) for name, array in padded.items()
        }
        return rows | flags | {"ids": torch.from_numpy(numbers_B)}

    def fingerprint(self) -> str:
        """SHA-256 of the files; the same wherever they were written."""
        return hashlib.sha256(f"{self._k} {sorted(self._digests.items())}".encode()).hexdigest()


def write_pool(folder: Path, rows: Iterable[Row], about: Callable[[], dict[str, Any]]) -> None:
    """Write rows as they come; the folder appears when it is complete, and replaces what was there.

    Args:
        folder: Folder of the pool.
        rows: Rows with equally many sequences and the same flags.
        about: Called after the last row: settings to keep with them; ``pad_id`` at least.

    Raises:
        TemperError: there are no rows, or one has other sequences or flags than the first; or the
            folder holds other files than a pool's.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        head = _write(staging, rows)
        staging.chmod(0o755)
        (staging / ABOUT).write_text(
            json.dumps(head | {"version": VERSION, "about": about()}), encoding="utf-8"
        )
        replace_folder(resolve_target(folder, "data.cache"), staging, "data.cache", _find_foreign)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _find_foreign(folder: Path) -> str:
    """In what a folder is more than a pool, which may be damaged; empty if in nothing."""
    for name in list_files(folder) if folder.is_dir() else ():
        # A flag's file has the flag's name.
        if not ((name == ABOUT or name.isidentifier()) and is_regular(folder / name)):
            return f"holds {name!r}, which is no file of a cache"
    return ""


def cached_pool(
    cache: Path,
    key: Mapping[str, Any],
    rows: Callable[[], Iterable[Row]],
    about: Callable[[], dict[str, Any]],
) -> TokenPool:
    """The pool with a key, from the cache folder or written there; a damaged one is written anew.

    Its files are hashed once: here if they were there, else while they are written.

    Args:
        cache: Folder of all pools.
        key: Everything that the rows depend on.
        rows: Makes the rows, if they are needed.
        about: See `write_pool`.
    """
    folder = cache / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    try:
        return TokenPool(folder)
    except (OSError, ValueError, KeyError):
        write_pool(folder, rows(), about)
    return TokenPool(folder, verify=False)


def _write(folder: Path, rows: Iterable[Row]) -> dict[str, Any]:
    """Files of rows; their digests are made as they are written."""
    files: dict[str, _Column] = {}
    n_rows = 0
    first: tuple[int, list[str]] | None = None
    try:
        for row in rows:
            kind = (len(row.ids), sorted(row.flags))
            if first is None:
                first = kind
                files = {
                    name: _Column(folder / name, TYPES.get(name, np.uint8))
                    for name in (*TYPES, *row.flags)
                }
                files["offsets"].add([0])
            if kind != first:
                raise TemperError(
                    f"row {n_rows + 1} has {kind[0]} answers and the flags {kind[1]}, the first row"
                    f" {first[0]} and {first[1]}"
                )
            for ids, trained in zip(row.ids, row.trained, strict=True):
                files["tokens"].add(ids)
                files["trained"].add(trained)
                files["offsets"].add([files["tokens"].size])
            for name, value in row.flags.items():
                files[name].add([value])
            n_rows += 1
    finally:
        for column in files.values():
            column.file.close()
    if first is None:
        raise TemperError("no row is left")
    return {
        "rows": n_rows,
        "sequences": first[0],
        "sha256": {name: column.digest.hexdigest() for name, column in files.items()},
    }


class _Column:
    """An array in a file that grows."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.file = path.open("wb")
        self.dtype = dtype
        self.size = 0
        self.digest = hashlib.sha256()

    def add(self, values: list[Any]) -> None:
        data = np.asarray(values, self.dtype).tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.size += len(values)


def _map(path: Path, dtype: Any) -> np.ndarray:
    # An empty file cannot be mapped; a pool has none, since rows have tokens.
    return np.memmap(path, dtype, mode="r")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
