"""Files of rows, read one row at a time: JSON, JSON lines, CSV, TSV, parquet, saved Hugging Face datasets.

All but a JSON array stream, so that a file may be larger than memory; of a JSON array the text is held, and
one row. Everything but parquet and datasets may be compressed with gzip (``rows.jsonl.gz``). Text is UTF-8, with or
without a byte order mark. A dataset is a folder written by ``save_to_disk``; of a folder with several splits one is
chosen by its name after a colon: ``folder:train``.
"""

import difflib
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from temper.data.broken import Cells, FileError, RowError, quote
from temper.data.file_arrow import dataset_rows, parquet_rows
from temper.data.file_json import json_rows, jsonl_rows
from temper.data.file_tables import csv_cells, named_rows, tsv_cells
from temper.errors import TemperError

Scanned = tuple[int, Cells | RowError]

TABLES = {".csv": csv_cells, ".tsv": tsv_cells}
FORMATS: dict[str, Callable[[Path], Iterator[Scanned]]] = {
    ".json": json_rows,
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".parquet": parquet_rows,
}
ACCEPTED = ".json, .jsonl, .csv, .tsv (each also with .gz), .parquet, or a folder saved with save_to_disk (folder:split)"


def scan(path: str | Path, columns: Sequence[str] | None = None, flag: str = "path") -> Iterator[Scanned]:
    """Rows of a file, each with its number from 1: the line of JSON lines, the record of other formats.

    A broken row is given as a `RowError`, and reading goes on after it.

    Args:
        path: File, dataset folder or ``folder:split``.
        columns: Names for the columns of a CSV or TSV file without a header.
        flag: What the user called the path, for errors.

    Raises:
        TemperError: the file cannot be read, or holds no rows.
    """
    place, split = locate(str(path), flag)
    n_rows = 0
    try:
        for n_rows, scanned in enumerate(_rows(place, split, columns), start=1):  # noqa: B007
            yield scanned
    except (FileError, OSError, EOFError, zlib.error) as problem:
        raise TemperError(f"{flag}={path}: cannot be read: {str(problem) or type(problem).__name__}") from problem
    if not n_rows:
        raise TemperError(f"{flag}={path}: holds no rows; choose another file")


def table_head(path: str | Path, flag: str = "path") -> list[str] | None:
    """First line of a CSV or TSV file, which may be its header; None for other formats and empty files.

    Raises:
        TemperError: there is no such file, or it cannot be read.
    """
    place, _ = locate(str(path), flag)
    if place.is_dir() or _suffix(place) not in TABLES:
        return None
    try:
        cells = next((cells for _, cells in TABLES[_suffix(place)](place)), None)
    except (FileError, OSError, EOFError, zlib.error) as problem:
        raise TemperError(f"{flag}={path}: cannot be read: {str(problem) or type(problem).__name__}") from problem
    return cells if isinstance(cells, list) else None


def _rows(place: Path, split: str | None, columns: Sequence[str] | None) -> Iterator[Scanned]:
    if place.is_dir():
        return dataset_rows(place, split)
    suffix = _suffix(place)
    if suffix in TABLES:
        return named_rows(TABLES[suffix](place), columns)
    if place.suffix == ".gz" and suffix == ".parquet":
        raise FileError("parquet is compressed inside; unpack it from .gz")
    if suffix not in FORMATS:
        raise FileError(f"files that end in {quote(''.join(place.suffixes[-2:]))} are not known; accepted: {ACCEPTED}")
    return FORMATS[suffix](place)


def _suffix(place: Path) -> str:
    return Path(place.name.removesuffix(".gz")).suffix.lower()


def locate(path: str, flag: str) -> tuple[Path, str | None]:
    """The file or folder, and the split asked for."""
    if Path(path).exists():
        return Path(path), None
    base, colon, split = path.rpartition(":")
    if colon and Path(base).is_dir():
        return Path(base), split
    if colon and Path(base).exists():
        raise TemperError(f"{flag}={path}: only a dataset folder has splits; give {base} alone")
    parent = Path(path).parent
    close = difflib.get_close_matches(Path(path).name, [p.name for p in parent.iterdir()] if parent.is_dir() else [], n=1)
    hint = f"did you mean {str(parent / close[0])!r}?" if close else f"accepted: {ACCEPTED}"
    raise TemperError(f"{flag}={path}: no such file; {hint}")
