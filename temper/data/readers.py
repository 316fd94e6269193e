"""Rows of JSON, CSV, TSV, parquet and saved datasets, as ``(number, cells)``.

Where a row could not be read a `RowError` takes the place of its cells, so that one bad line costs
one row. Errors name columns, roles and places, never the text of a row, which may not be fit for a
log. Short values, such as labels, are quoted up to `QUOTED` characters.
"""

import csv
import gzip
import importlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from temper.errors import TemperError
from temper.packages import install_hint

# -- rows, and errors in them

Cells = Mapping[str, Any]
QUOTED = 40


class RowError(TemperError):
    """A broken row, with the reason; the rows after it can still be read."""


class FileError(ValueError):
    """A file that cannot be read (any further), with the reason."""


Scanned = tuple[int, Cells | RowError]


def quote(value: object) -> str:
    """A value for an error: on one line, shortened."""
    text = repr(value[: QUOTED + 1] if isinstance(value, str) else value)
    return text if len(text) <= QUOTED + 2 else f"{text[:QUOTED]}..."


# -- JSON and JSON lines

BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
ROWS_KEYS = (
    "data",
    "rows",
    "records",
    "examples",
    "instances",
    "train",
)  # where an object keeps its array of rows
BLANK = re.compile(r"[ \t\n\r]*")


def open_bytes(file: Path) -> BinaryIO:
    """Open a file of bytes, unpacked if its name ends in .gz.

    Raises:
        FileError: its text is UTF-16.
    """
    stream = cast(BinaryIO, gzip.open(file) if file.suffix == ".gz" else file.open("rb"))  # noqa: SIM115
    start = stream.read(2)
    stream.seek(0)
    if start in UTF16:
        stream.close()
        raise FileError("the text is UTF-16; save it as UTF-8")
    return stream


def jsonl_rows(file: Path) -> Iterator[Scanned]:
    """Rows of JSON lines, one object a line; blank lines are skipped. Rows are numbered as
    lines.
    """
    with open_bytes(file) as stream:
        for number, line in enumerate(map(_bare, stream), start=1):
            if line:
                yield number, _line(line)


def json_rows(file: Path) -> Iterator[Scanned]:
    """Rows of an array of objects, or of an object that holds the array under one of `ROWS_KEYS`;
    JSON lines under the wrong name are read too.

    Raises:
        FileError: the text is no JSON. Rows after a syntax error inside an array cannot be found,
            so it ends the reading even where broken rows are skipped.
    """
    with open_bytes(file) as stream:
        first = next((line for line in map(_bare, stream) if line), b"")
        head = _line(first) if first.startswith(b"{") else None
        if isinstance(head, dict) and not _array_key(head):
            yield from jsonl_rows(file)
            return
        stream.seek(0)
        content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise FileError(
            f"{_bad_bytes(problem)} (byte {problem.start + 1:,}); save it as UTF-8, or fix that"
            " place"
        ) from problem
    del content
    start = _after_blanks(text, 0)
    if text.startswith("{", start):
        yield from _inside_object(text)
    elif text.startswith("[", start):
        yield from _array(text, start)
    elif text[start:]:
        raise FileError("wanted a JSON array of objects, or one object a line")


def _bare(line: bytes) -> bytes:
    return line.removeprefix(BOM).strip()


def _line(content: bytes) -> Cells | RowError:
    try:
        value = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as problem:
        return RowError(f"{_bad_bytes(problem)} at byte {problem.start + 1:,} of the line")
    except (ValueError, RecursionError) as problem:
        return RowError(f"bad JSON: {_syntax_error(problem)}")
    return _cells(value)


def _cells(value: object) -> Cells | RowError:
    return (
        value
        if isinstance(value, dict)
        else RowError(f"wanted an object of columns, found {kind(value)}")
    )


def _array(text: str, start: int) -> Iterator[Scanned]:
    """Elements of the array that opens at ``start``, decoded one by one."""
    decode = json.JSONDecoder().raw_decode
    row = 0
    position = _after_blanks(text, start + 1)
    more = not text.startswith("]", position)
    while more:
        row += 1
        try:
            value, position = decode(text, position)
        except (ValueError, RecursionError) as problem:
            raise FileError(
                f"row {row}: bad JSON: {_syntax_error(problem)}; {_lost(row - 1)}"
            ) from problem
        yield row, _cells(value)
        position = _after_blanks(text, position)
        more = text.startswith(",", position)
        if not more and not text.startswith("]", position):
            where = f"line {text.count(chr(10), 0, position) + 1}"
            raise FileError(
                f"after row {row}: bad JSON: wanted a comma or ']' at {where}; {_lost(row)}"
            )
        position = _after_blanks(text, position + 1) if more else position
    if _after_blanks(text, position + 1) < len(text):
        raise FileError(
            f"something follows the end of the array, after row {row}; a file holds one array"
        )


def _inside_object(text: str) -> Iterator[Scanned]:
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise FileError(f"bad JSON: {_syntax_error(problem)}") from problem
    key = _array_key(whole)
    if key is None:
        raise FileError(
            "it holds one object; wanted an array of objects, or the array under one of"
            f" {', '.join(ROWS_KEYS)}"
        )
    yield from ((row, _cells(value)) for row, value in enumerate(whole[key], start=1))


def _array_key(whole: Cells) -> str | None:
    return next((key for key in ROWS_KEYS if isinstance(whole.get(key), list)), None)


def _after_blanks(text: str, position: int) -> int:
    blanks = BLANK.match(text, position)
    return blanks.end() if blanks else position


def _lost(n_before: int) -> str:
    return (
        f"{n_before:,} rows came before it, and nothing after it can be found: fix it, or save"
        " JSON lines, where a bad line costs one row"
    )


def _syntax_error(problem: Exception) -> str:
    if isinstance(problem, json.JSONDecodeError):
        return f"{problem.msg} (line {problem.lineno:,}, column {problem.colno:,})".replace(
            "(line 1, ", "("
        )
    return "nested too deeply" if isinstance(problem, RecursionError) else "a number is too long"


def _bad_bytes(problem: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{problem.object[problem.start]:02x}"


KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def kind(value: object) -> str:
    """Name of a JSON value's type, for errors."""
    return KINDS.get(type(value), type(value).__name__)


# -- CSV and TSV

Line = tuple[str, list[str] | RowError]  # its place in the file, and its cells

LONGEST_CELL = 2**31 - 1  # the csv module's own limit is 131,072 characters
# Quotes around the cell, and doubled ones inside.
QUOTED_AS_CSV = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')


def csv_cells(file: Path) -> Iterator[Line]:
    """Cells of comma-separated lines; quoted cells may hold commas, line breaks and doubled quotes.

    Raises:
        FileError: a quote is never closed, which hides all rows after it.
    """
    csv.field_size_limit(LONGEST_CELL)
    with io.TextIOWrapper(
        open_bytes(file), encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as text:
        reader = csv.reader(text, strict=True)
        while True:
            before = reader.line_num
            try:
                cells: list[str] | RowError = next(reader)
            except StopIteration:
                return
            except csv.Error as problem:
                if "unexpected end of data" in str(problem):
                    raise FileError(
                        f"a quote in the row that begins on line {before + 1:,} is never closed;"
                        " close it"
                    ) from problem
                cells = RowError(f"bad CSV: {problem} ({_lines(before + 1, reader.line_num)})")
            if cells:
                yield _lines(before + 1, reader.line_num), cells


def tsv_cells(file: Path) -> Iterator[Line]:
    """Cells of tab-separated lines, as IANA defines them: cells hold no tabs and no line breaks,
    and quotes are plain characters.
    """
    with io.TextIOWrapper(
        open_bytes(file), encoding="utf-8-sig", errors="surrogateescape", newline="\n"
    ) as text:
        for number, line in enumerate(text, start=1):
            cells = line.removesuffix("\n").removesuffix("\r").split("\t")
            if any(map(QUOTED_AS_CSV.fullmatch, cells)):
                yield (
                    f"line {number:,}",
                    RowError(
                        "a cell is quoted as in CSV, and TSV knows no quoting; save the file as CSV"
                    ),
                )
            elif cells != [""]:
                yield f"line {number:,}", cells


def named_rows(lines: Iterator[Line], columns: Sequence[str] | None) -> Iterator[Scanned]:
    """Rows of lines: cells by the names of their columns.

    Args:
        lines: Lines of cells.
        columns: Names of the columns; None: the first line has them.

    Raises:
        FileError: the header cannot be read, or names a column twice.
    """
    names = list(columns) if columns is not None else _header(lines)
    for row, (where, cells) in enumerate(lines, start=1):
        yield row, _named(cells, names, where)


def _header(lines: Iterator[Line]) -> list[str]:
    where, cells = next(lines, ("", []))
    problem = cells if isinstance(cells, RowError) else _not_utf8(cells)
    if isinstance(cells, RowError) or problem:
        raise FileError(f"its header ({where}) is broken: {problem}")
    names = [cell.strip() for cell in cells]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise FileError(f"its header names the column {quote(twice)} twice; rename one")
    return names


def _named(cells: list[str] | RowError, names: list[str], where: str) -> Cells | RowError:
    if isinstance(cells, RowError):
        return cells
    if len(cells) != len(names):
        return RowError(f"{len(cells)} cells on {where}, and there are {len(names)} columns")
    return _not_utf8(cells, where) or dict(zip(names, cells, strict=True))


def _not_utf8(cells: list[str], where: str = "") -> RowError | None:
    """Error of the first cell that was not UTF-8: decoding has turned its bytes into halves of
    surrogate pairs, U+DC80 to U+DCFF.
    """
    for cell in cells:
        bad = None if cell.isascii() else next((c for c in cell if "\udc80" <= c <= "\udcff"), None)
        if bad:
            return RowError(f"not UTF-8: byte 0x{ord(bad) - 0xDC00:02x} on {where or 'line 1'}")
    return None


def _lines(first: int, last: int) -> str:
    return f"line {first:,}" if last <= first else f"lines {first:,} to {last:,}"


# -- parquet files, and datasets saved by Hugging Face's ``save_to_disk``

ROWS_AT_ONCE = 256  # rows of a batch that are Python objects at the same time


def parquet_rows(file: Path) -> Iterator[Scanned]:
    """Rows of a parquet file, `ROWS_AT_ONCE` of them in memory. All structs of a column have the
    same keys; those that are null inside a cell are left out, as JSON lines leave them out.

    Raises:
        FileError: it is no parquet file, or pyarrow is missing.
    """
    pyarrow = _needs("pyarrow", "parquet files")
    parquet = _needs("pyarrow.parquet", "parquet files")
    row = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE):
                for cells in _batch_rows(batch):
                    row += 1
                    yield row, cells
    except pyarrow.ArrowException as problem:
        raise FileError(f"no parquet after row {row:,}: {_one_line(problem)}") from problem


def dataset_rows(folder: Path, split: str | None) -> Iterator[Scanned]:
    """Rows of a saved dataset, memory-mapped; nulls as in `parquet_rows`.

    Raises:
        FileError: the folder holds no saved dataset, the split is not in it or none was chosen, or
            ``datasets`` is missing.
    """
    datasets = _needs("datasets", "saved datasets")
    try:
        dataset = datasets.load_from_disk(str(_dataset_folder(folder, split))).with_format("arrow")
    except (KeyError, TypeError, ValueError) as problem:
        raise (
            problem
            if isinstance(problem, FileError)
            else FileError(f"the saved dataset is damaged: {_one_line(problem)}")
        ) from problem
    row = 0
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        for cells in _batch_rows(dataset[start : start + ROWS_AT_ONCE]):
            row += 1
            yield row, cells


def _dataset_folder(folder: Path, split: str | None) -> Path:
    """The folder of one split."""
    if (folder / "dataset_dict.json").is_file():
        splits: list[str] = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        chosen = splits[0] if split is None and len(splits) == 1 else split
        if chosen not in splits:
            found = (
                f"it has no split {quote(split)}" if split is not None else "it has several splits"
            )
            raise FileError(
                f"{found}; choose one: {', '.join(f'{folder}:{name}' for name in splits)}"
            )
        return folder / str(chosen)
    if not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise FileError(
            f"it is a folder, and no dataset saved with save_to_disk (it holds {names}); name a"
            " file in it"
        )
    if split is not None:
        raise FileError(f"this dataset has no splits; give {folder} alone")
    return folder


def _batch_rows(batch: Any) -> Iterator[Cells | RowError]:
    """Rows of an Arrow table or record batch."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # now try row by row
        for index in range(batch.num_rows):
            try:
                yield from map(_without_nulls, batch.slice(index, 1).to_pylist())
            except UnicodeDecodeError as problem:
                yield RowError(f"not UTF-8: byte 0x{problem.object[problem.start]:02x}")
            except (ValueError, OverflowError) as problem:  # such as a date after the year 9999
                yield RowError(f"a value cannot be read: {_one_line(problem)}")
        return
    yield from map(_without_nulls, rows)


def _without_nulls(cells: Cells) -> Cells:
    """Cells whose structs, at any depth, have the keys that are not null."""
    return {name: _pruned(value) for name, value in cells.items()}


def _pruned(value: object) -> object:
    if isinstance(value, dict):
        return {key: _pruned(inner) for key, inner in value.items() if inner is not None}
    return [_pruned(item) for item in value] if isinstance(value, list) else value


def _needs(module: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise FileError(
            f"{purpose} need a package that is missing: {install_hint(module)}"
        ) from problem


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:200]
