"""Layouts of rows: the table of known layouts, their detection from column names, and reading the
examples of a file.

Detection tries the most specific layout first. All rows of a file have one layout; a row of another
is broken, and the error names both. ``layout=`` chooses one where detection would be wrong.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

from temper.data import layout_rows as rows
from temper.data.examples import Example
from temper.data.files import ReadReport, good_rows, scan
from temper.data.layout_rows import Names, find
from temper.data.readers import Cells, RowError, quote
from temper.data.turns import read_text
from temper.errors import TemperError, close_names, did_you_mean

# -- the table of layouts


@dataclass(frozen=True)
class Layout:
    """A layout: the columns of a row, and the function that reads them.

    Args:
        name: Name for ``layout=``.
        kind: Kind of examples: ``supervised`` (one answer), ``preference``, ``kto``, or ``prompt``
            (no answer).
        required: Groups of names; a row has a column of each.
        optional: Columns that are read if they are there.
        read: Makes an example of a row.
    """

    name: str
    kind: str
    required: tuple[Names, ...]
    optional: Names
    read: Callable[[Cells], Example]

    def __str__(self) -> str:
        return f"{self.name} ({' + '.join('|'.join(group) for group in self.required)})"

    def needed(self, want: str) -> tuple[Names, ...]:
        """Groups of columns that a row must have; an evaluation prompt needs no answer."""
        prompts = tuple(group for group in self.required if set(group) & set(rows.PROMPT))
        return prompts if want == "prompt" and prompts else self.required

    def missing(self, columns: Iterable[str], want: str = "") -> list[Names]:
        """Groups that are needed and of which no column is there."""
        return [group for group in self.needed(want) if not set(group) & set(columns)]


ALPACA = ("history", *rows.INPUT, *rows.ASIDE)
LAYOUTS = {
    layout.name: layout
    # The more specific before the more general: detection takes the first that fits.
    for layout in (
        Layout(
            "preference",
            "preference",
            (rows.PROMPT, ("chosen",), ("rejected",)),
            ALPACA,
            rows.preference_row,
        ),
        Layout(
            "preference_messages",
            "preference",
            (rows.CHOSEN, rows.REJECTED),
            rows.ASIDE,
            rows.preference_row,
        ),
        Layout("kto_messages", "kto", (rows.TURNS, rows.LABEL), rows.ASIDE, rows.kto_turns_row),
        Layout(
            "kto",
            "kto",
            ((*rows.PLAIN_PROMPT, "instruction"), (*rows.ANSWER, "output"), rows.LABEL),
            ALPACA,
            rows.kto_row,
        ),
        Layout("alpaca", "supervised", (("instruction",), rows.OUTPUT), ALPACA, rows.alpaca_row),
        Layout("messages", "supervised", (("messages",),), rows.ASIDE, rows.turns_row),
        Layout(
            "sharegpt",
            "supervised",
            (("conversations", "conversation"),),
            rows.ASIDE,
            rows.turns_row,
        ),
        Layout(
            "prompt_completion",
            "supervised",
            (rows.PLAIN_PROMPT, rows.ANSWER),
            rows.ASIDE,
            rows.plain_row,
        ),
        Layout("prompt", "prompt", ((*rows.PLAIN_PROMPT, "instruction"),), ALPACA, rows.prompt_row),
    )
}
TAKES: dict[str, Names] = {  # kind of examples wanted: kinds of layout that have them
    "supervised": ("supervised",),
    "preference": ("preference",),
    "kto": ("kto",),
    "unlearning": ("supervised",),
    "unlearning_answer": ("supervised",),
    "prompt": ("supervised", "preference", "kto", "prompt"),
}


MEASURED: tuple[Names, ...] = ((rows.PARAPHRASE,), (rows.PERTURBED,))
ALSO_READ: dict[str, tuple[Names, ...]] = {  # columns that a kind reads beside those of a layout
    "unlearning": (rows.SUBSTITUTE, *MEASURED),
    "unlearning_answer": MEASURED,
}


@dataclass(frozen=True)
class Detected:
    """The detected layout of a file, and the row and columns that it was detected from.

    Args:
        layout: The layout.
        row: Number of the row.
        columns: All columns of that row.
        used: Those that are read.
    """

    layout: Layout
    row: int
    columns: Names
    used: Names

    @property
    def name(self) -> str:
        """Name of the layout."""
        return self.layout.name

    @property
    def unused(self) -> Names:
        """Columns that nothing reads."""
        return tuple(name for name in self.columns if name not in self.used)

    def __str__(self) -> str:
        unused = f"; not read: {name_list(self.unused)}" if self.unused else ""
        return (
            f"layout {self.layout.name}, from the columns {name_list(self.used)} of row"
            f" {self.row}{unused}"
        )


@lru_cache(maxsize=256)  # rows of a file have few sets of columns
def detect(columns: frozenset[str]) -> Layout | None:
    """First layout that these columns fit; None if none does."""
    return next((layout for layout in LAYOUTS.values() if not layout.missing(columns)), None)


def detect_row(cells: Cells, want: str) -> Layout | None:
    """First layout that fits the columns of a row that are not null, or else all its columns (so
    that the null can be named).

    Of a prompt that is evaluated, a label that is no mark of an answer (``safe``, a topic) is
    another column that nothing reads.
    """
    present = {name for name, value in cells.items() if value is not None}
    if want == "prompt":
        labels = present.intersection(rows.LABEL)
        present -= {name for name in labels if rows.read_mark(cells[name]) is None}
    found = detect(frozenset(present))
    if found is None or found.kind not in TAKES[want]:
        whole = detect(frozenset(cells))
        found = whole if whole and whole.kind in TAKES[want] else found or whole
    return found


@lru_cache(maxsize=256)  # all rows of a file may be broken, and alike
def explain(columns: Names, want: str, expected: Layout | None = None) -> str:
    """Error text for a row that fits no layout: its columns, and the layouts that were expected.

    Args:
        columns: Columns of the row.
        want: Kind of examples wanted; all layouts that have them are listed, the nearest first.
        expected: Layout of the file, which is then listed alone.
    """
    served = [layout for layout in LAYOUTS.values() if layout.kind in TAKES[want]]
    nearest = (
        [expected] if expected else sorted(served, key=lambda layout: _distance(layout, columns))
    )
    close = [
        f"{match[0]!r} for {name!r}"
        for group in nearest[0].missing(columns)
        for name in group
        if (match := close_names(name, columns, cutoff=0.75))
    ][:1]
    hint = f" (is {close[0]} a typing error?)" if close else ""
    order = "expected" if expected else "expected, nearest first,"
    return f"found the columns {name_list(columns)}{hint}; {order} {', '.join(map(str, nearest))}"


def _distance(layout: Layout, columns: Names) -> float:
    """Share of the groups that are missing; one with a column of a similar name counts less."""

    def likeness(group: Names) -> float:
        return max(
            (
                difflib.SequenceMatcher(None, name, column).ratio()
                for name in group
                for column in columns
            ),
            default=0.0,
        )

    missing = layout.missing(columns)
    return sum(1 - likeness(group) / 2 for group in missing) / len(layout.required) - 0.01 * len(
        layout.required
    )


def name_list(columns: Names) -> str:
    """Names of columns for an error, at most 10 of them."""
    return (
        ", ".join(map(quote, columns[:10]))
        + (f" and {len(columns) - 10} more" if len(columns) > 10 else "")
        if columns
        else "(none)"
    )


# -- reading

Want = Literal["supervised", "preference", "kto", "unlearning", "unlearning_answer", "prompt"]


def read_examples(
    path: str | Path,
    want: Want,
    layout: str = "auto",
    skip_broken: bool = False,
    flag: str = "path",
    report: ReadReport | None = None,
) -> Iterator[Example]:
    """Yield the examples of a file, in its order, one row in memory at a time.

    A row is broken if it cannot be read, has a null or an empty answer, has another layout than the
    rows before it, or repeats the ``id`` of another row. An answer of white space is empty. For
    ``prompt`` the answers become the reference: the chosen one of a pair, a desirable one, the only
    one; there may be none, and a label that marks no answer is not read.

    Args:
        path: File, dataset folder or ``folder:split``.
        want: Kind of examples. ``unlearning`` rows are supervised rows, with a second answer where
            the file has a column ``substitute`` or ``idk``; ``unlearning_answer`` leaves that out.
            Both have the answers that the truth ratio compares (``paraphrased_answer``,
            ``perturbed_answer``), where there are any.
        layout: ``auto``, or one of `LAYOUTS`.
        skip_broken: Leave broken rows out and count them; else they are an error, raised when the
            file has been read to its end: a caller that writes while it reads must discard what it
            has written.
        flag: Flag that gave the path, for errors.
        report: Filled in while reading; a new one per file.

    Raises:
        TemperError: no such file or layout, a file that cannot be read, broken rows.
    """
    if want not in get_args(Want):
        raise ValueError(f"want={want!r}; accepted: {', '.join(get_args(Want))}")
    chosen = None if layout == "auto" else _named(layout, want, f"{flag}={path}")
    parse = _Parser(want, chosen, str(path), report)
    return good_rows(scan(path, flag=flag), parse, f"{flag}={path}", skip_broken, report)


def describe_layout(
    path: str | Path, flag: str = "path", layout: str = "auto", want: Want = "supervised"
) -> Detected:
    """Layout of a file, from its first row that has a known one, and the columns that are read.

    Args:
        path: File, dataset folder or ``folder:split``.
        flag: Flag that gave the path, for errors.
        layout: ``auto``, or the layout that the row must have.
        want: Kind of examples that are read.

    Raises:
        TemperError: the file cannot be read, or no row has a known layout.
    """
    first: RowError | None = None
    for row, cells in scan(path, flag=flag):
        if isinstance(cells, RowError):
            first = first or cells
            continue
        found = detect_row(cells, want) if layout == "auto" else LAYOUTS[layout]
        if found and not found.missing(cells, want) and found.kind in TAKES[want]:
            groups = (*found.required, *ALSO_READ.get(want, ()))
            read = [find(cells, group) for group in groups]
            used = tuple(
                name
                for name in cells
                if name in (*read, "id") or (name in found.optional and cells[name] is not None)
            )
            return Detected(found, row, tuple(cells), used)
        first = first or RowError(explain(tuple(cells), want))
    raise TemperError(f"{flag}={path}: no row has a known layout; the first: {first}")


class _Parser:
    """Makes examples of rows; keeps the properties that all rows of a file must share."""

    def __init__(
        self, want: Want, chosen: Layout | None, file: str, report: ReadReport | None
    ) -> None:
        self.want = want
        self.chosen = chosen
        self.file = file
        self.report = report
        self.layout: Layout | None = None
        # Hash of an id: its row. About 100 bytes for each row that has one.
        self.ids: dict[int, int] = {}
        self.n_answers: int | None = None

    def __call__(self, row: int, cells: Cells) -> Example:
        layout = self._layout(cells)
        without = any(find(cells, group) is None for group in layout.required)
        # Only an evaluation prompt may be without the layout's answer.
        read = rows.prompt_row(cells, layout.required[0]) if without else layout.read(cells)
        example = FINISH[self.want](read, cells)
        _check_prompt(example)
        if self.n_answers not in (None, len(example.answers)):
            found = len(example.answers)
            raise RowError(
                f"its number of answers is {found}, not {self.n_answers}; give every row a"
                " substitute, or none"
            )
        identity = hash(repr(cells["id"])) if cells.get("id") is not None else None
        if identity in self.ids:
            raise RowError(f"its id {quote(cells['id'])} is that of row {self.ids[identity]} too")
        if identity is not None:
            self.ids[identity] = row
        self.layout = layout
        self.n_answers = len(example.answers)
        if self.report is not None:
            self.report.layout = layout.name
        return replace(example, file=self.file, row=row)

    def _layout(self, cells: Cells) -> Layout:
        """Layout of the file, if this row has it and all its columns."""
        layout = self.chosen or detect_row(cells, self.want)
        if self.chosen and self.chosen.missing(cells, self.want):
            hint = "; eval_layout=auto finds it out" if self.want == "prompt" else ""
            raise RowError(
                f"the given layout {self.chosen} does not fit;"
                f" {explain(tuple(cells), self.want)}{hint}"
            )
        if layout is None:
            raise RowError(explain(tuple(cells), self.want, self.layout))
        if layout.kind not in TAKES[self.want]:
            raise RowError(
                f"its layout is {layout}, no {self.want} rows;"
                f" {explain(tuple(cells), self.want, self.layout)}"
            )
        if self.layout not in (None, layout):
            raise RowError(
                f"its layout is {layout}, and that of the rows before it {self.layout}; keep one"
                " layout in a file"
            )
        for group in layout.needed(self.want):
            there = next((name for name in group if name in cells), None)
            if there and find(cells, group) is None:
                raise RowError(f"column {there!r} is null")
        return layout


def _one_answer(example: Example, cells: Cells) -> Example:
    if not example.answers:
        last = example.prompt[-1].role if example.prompt else "nothing"
        raise RowError(f"it has no answer: its last turn is of {last}, wanted assistant")
    names = ("answer",) if len(example.answers) == 1 else ("chosen answer", "rejected answer")
    empty = next(
        (
            name
            for name, reply in zip(names, example.replies, strict=True)
            if not (reply.content.strip() or reply.tool_calls)
        ),
        None,
    )
    if empty:
        raise RowError(f"its {empty} is empty")
    return example


def _with_substitute(example: Example, cells: Cells) -> Example:
    column = find(cells, rows.SUBSTITUTE)
    if not column:
        return _one_answer(example, cells)
    substitute = read_text(cells[column], f"column {column!r}")
    if not substitute.strip():
        raise RowError(f"column {column!r} is empty")
    return replace(_one_answer(example, cells), answers=(*example.answers, substitute))


def _unlearning(example: Example, cells: Cells) -> Example:
    return rows.with_measured(_with_substitute(example, cells), cells)


def _unlearning_answer(example: Example, cells: Cells) -> Example:
    return rows.with_measured(_one_answer(example, cells), cells)


def _as_prompt(example: Example, cells: Cells) -> Example:
    known = example.answers[:1] if example.desirable in (None, True) else ()
    return Example(
        example.prompt,
        reference=next((answer for answer in known if answer.strip()), None),
        tools=example.tools,
    )


FINISH: dict[str, Callable[[Example, Cells], Example]] = {
    "supervised": _one_answer,
    "preference": _one_answer,
    "kto": _one_answer,
    "unlearning": _unlearning,
    "unlearning_answer": _unlearning_answer,
    "prompt": _as_prompt,
}


def _check_prompt(example: Example) -> None:
    last = example.prompt[-1] if example.prompt else None
    if last is None or last.role not in ("user", "tool"):
        raise RowError(
            f"before the answer stands {f'the turn of {last.role}' if last else 'nothing'}; wanted"
            " a user's turn"
        )
    if last.role == "user" and not last.content.strip():
        raise RowError("its prompt is empty")


def _named(name: str, want: Want, source: str) -> Layout:
    if name not in LAYOUTS:
        hint = did_you_mean(name, LAYOUTS, f"accepted: auto, {', '.join(LAYOUTS)}")
        raise TemperError(f"{source}: layout={name!r} is not known; {hint}")
    if LAYOUTS[name].kind not in TAKES[want]:
        served = ", ".join(layout.name for layout in LAYOUTS.values() if layout.kind in TAKES[want])
        raise TemperError(
            f"{source}: layout={name!r} holds no {want} rows; accepted: auto, {served}"
        )
    return LAYOUTS[name]
