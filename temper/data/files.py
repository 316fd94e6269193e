"""Files of rows in any format: choosing the reader of a file, and counting, skipping or refusing
broken rows.
"""

import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from temper.data.examples import Example
from temper.data.readers import (
    Cells,
    FileError,
    RowError,
    Scanned,
    csv_cells,
    dataset_rows,
    json_rows,
    jsonl_rows,
    named_rows,
    parquet_rows,
    quote,
    tsv_cells,
)
from temper.errors import TemperError, did_you_mean

SHOWN = 3  # different reasons that are kept
TABLES = {".csv": csv_cells, ".tsv": tsv_cells}
FORMATS: dict[str, Callable[[Path], Iterator[Scanned]]] = {
    ".json": json_rows,
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".parquet": parquet_rows,
}
ACCEPTED = (
    ".json, .jsonl, .csv, .tsv (each also with .gz), .parquet, or a folder saved with save_to_disk"
    " (folder:split)"
)


@dataclass
class Problem:
    """A reason, the first row that has it, and how many rows more."""

    row: int
    reason: str
    more: int = 0

    def __str__(self) -> str:
        more = f" and {self.more:,} more" if self.more else ""
        return f"row {self.row}{more}: {self.reason}"


@dataclass
class ReadReport:
    """Counts of one file's rows, filled in by a reader; complete when the reader has ended. Use a
    new one for every file.

    Args:
        n_good: Rows that became examples.
        n_broken: Rows that did not.
        problems: The first `SHOWN` different reasons.
        layout: Name of the layout that was read, if rows have one.
    """

    n_good: int = 0
    n_broken: int = 0
    problems: list[Problem] = field(default_factory=list)
    layout: str = ""

    def note(self, row: int, reason: str) -> None:
        """Count a broken row."""
        self.n_broken += 1
        same = next((problem for problem in self.problems if problem.reason == reason), None)
        if same:
            same.more += 1
        elif len(self.problems) < SHOWN:
            self.problems.append(Problem(row, reason))

    def __str__(self) -> str:
        count = f"{self.n_broken:,} of {self.n_good + self.n_broken:,} rows broken"
        return "; ".join([f"{count}, {self.n_good:,} good", *map(str, self.problems)])


def good_rows(
    rows: Iterable[tuple[int, Cells | RowError]],
    parse: Callable[[int, Cells], Example],
    source: str,
    skip_broken: bool,
    report: ReadReport | None,
) -> Iterator[Example]:
    """Yield the examples of the good rows, and count the broken ones.

    Without ``skip_broken`` the first broken row ends the examples, but the file is read to its end,
    so that the error can count. No row is held in memory.

    Args:
        rows: Numbered cells; a `RowError` in their place where a row is broken.
        parse: Makes an example of a row, or raises `RowError`.
        source: Flag and file, the beginning of every error.
        skip_broken: Leave broken rows out; without a ``report`` a warning says how many they were.
        report: Filled in while reading.

    Raises:
        TemperError: rows are broken and are not to be left out, or no row is good.
    """
    found = ReadReport() if report is None else report
    for row, cells in rows:
        try:
            if isinstance(cells, RowError):
                raise cells
            example = parse(row, cells)
        except RowError as problem:
            found.note(row, str(problem))
            continue
        found.n_good += 1
        if skip_broken or not found.n_broken:
            yield example
    if found.n_broken and not (skip_broken and found.n_good):
        way_out = (
            "fix them, or leave them out with skip_broken=true"
            if found.n_good
            else "no row is left to read"
        )
        raise TemperError(f"{source}: {found}; {way_out}")
    if found.n_broken and report is None:
        warnings.warn(f"{source}: {found}; the broken ones are left out", stacklevel=2)


def scan(
    path: str | Path, columns: Sequence[str] | None = None, flag: str = "path"
) -> Iterator[Scanned]:
    """Yield the rows of a file, each with its number from 1: the line of JSON lines, the record of
    other formats.

    A broken row is a `RowError` instead of its cells, and reading goes on after it.

    Args:
        path: File, dataset folder or ``folder:split``.
        columns: Names for the columns of a CSV or TSV file without a header.
        flag: Flag that gave the path, for errors.

    Raises:
        TemperError: the file cannot be read, or holds no rows.
    """
    place, split = locate(str(path), flag)
    n_rows = 0
    try:
        for n_rows, scanned in enumerate(_rows(place, split, columns), start=1):  # noqa: B007
            yield scanned
    except (FileError, OSError, EOFError, zlib.error) as problem:
        raise TemperError(
            f"{flag}={path}: cannot be read: {str(problem) or type(problem).__name__}"
        ) from problem
    if not n_rows:
        raise TemperError(f"{flag}={path}: holds no rows; choose another file")


def table_head(path: str | Path, flag: str = "path") -> list[str] | None:
    """First line of a CSV or TSV file, which may be its header; None for other formats and empty
    files.

    Raises:
        TemperError: there is no such file, or it cannot be read.
    """
    place, _ = locate(str(path), flag)
    if place.is_dir() or _suffix(place) not in TABLES:
        return None
    try:
        cells = next((cells for _, cells in TABLES[_suffix(place)](place)), None)
    except (FileError, OSError, EOFError, zlib.error) as problem:
        raise TemperError(
            f"{flag}={path}: cannot be read: {str(problem) or type(problem).__name__}"
        ) from problem
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
        raise FileError(
            f"files that end in {quote(''.join(place.suffixes[-2:]))} are not known; accepted:"
            f" {ACCEPTED}"
        )
    return FORMATS[suffix](place)


def _suffix(place: Path) -> str:
    return Path(place.name.removesuffix(".gz")).suffix.lower()


def locate(path: str, flag: str) -> tuple[Path, str | None]:
    """Split a path into the file or folder and the chosen split.

    Raises:
        TemperError: there is no such file.
    """
    if Path(path).exists():
        return Path(path), None
    base, colon, split = path.rpartition(":")
    if colon and Path(base).is_dir():
        return Path(base), split
    if colon and Path(base).exists():
        raise TemperError(f"{flag}={path}: only a dataset folder has splits; give {base} alone")
    parent = Path(path).parent
    beside = [str(p) for p in parent.iterdir()] if parent.is_dir() else []
    hint = did_you_mean(str(Path(path)), beside, f"accepted: {ACCEPTED}")
    raise TemperError(f"{flag}={path}: no such file; {hint}")
