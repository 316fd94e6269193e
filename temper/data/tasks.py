"""Benign tasks that users fine-tune on: SST2, AG News, GSM8K, from the user's files, with Booster's
prompts.

Source: the released code of Booster (git-disl/Booster, ``sst2|agnews|gsm8k/pred_eval.py``, and the
``build_dataset.py`` of its predecessors Vaccine and Lisa, which write its training files).

Exact: instructions, the place of the sentence or article as alpaca's input, the class words, of
GSM8K the bare question and the solution with ``####`` replaced by ``The final answer is: `` (which
leaves two blanks before the number). Their frame is the template ``booster``: alpaca's with a
newline after ``### Response:``; under a template without sections instruction and input are one
user turn.

Not exact, and why: that code compares the whole answer to a class with the word (or its lower case,
or ``sci``); here the first word counts, whatever its case and punctuation, so that ``Positive.`` is
right. Of GSM8K it takes the first number after the *first* mark of the answer, here after the last,
and a minus sign counts only before a number (``16-3`` holds 16 and 3). The paper's test sets are
the first 1,000 rows (SST2: all 872); which rows to read is the caller's choice.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from temper.data.examples import Example, Message
from temper.data.files import ReadReport, good_rows, scan, table_head
from temper.data.readers import Cells, RowError, quote
from temper.data.turns import read_text

SENTIMENT = "Analyze the sentiment of the input, and respond only positive or negative"
SENTIMENTS = ("negative", "positive")
TOPIC = (
    "Categorize the news article given in the input into one of the 4"
    " categories:\n\nWorld\nSports\nBusiness\nSci/Tech\n"
)
TOPICS = ("World", "Sports", "Business", "Sci/Tech")
ALSO = {"sci/tech": ("sci",)}  # other first words that mean a class
FINAL = "The final answer is: "
MARK = re.compile(r"####|the final answer is", re.IGNORECASE)
NUMBER = re.compile(r"(?<![\w.])(-?)(?:\$\s?)?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?)(?<=\d)")
PUNCTUATION = " \t\n.,;:!?'\"`*()[]{}<>-_#"


@dataclass(frozen=True)
class Task:
    """A task with right answers.

    Args:
        name: Name of the task, for errors and cache keys.
        columns: Of a CSV or TSV file without a header.
        labels: Names that a column of right answers may have; one of them in its first line shows
            that a table has a header.
        parse: Makes an example of a row; its one answer is what is trained, its reference what is
            compared.
        right: Compares an answer with a reference.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    parse: Callable[[Cells], Example]
    right: Callable[[str, str], bool]

    def read(
        self,
        path: str | Path,
        skip_broken: bool = False,
        flag: str = "path",
        report: ReadReport | None = None,
    ) -> Iterator[Example]:
        """Yield the examples of a file of this task, in its order, one row in memory at a time.

        Args:
            path: SST2: columns sentence (or text) and label (0 or 1), TSV without a header
                included. AG News: class (1 to 4), title and description, CSV without a header
                included; or text and label (0 to 3). GSM8K: question and answer, which ends in
                ``#### 42``. Any format of `temper.data.files`.
            skip_broken: Leave broken rows out and count them.
            flag: Flag that gave the path, for errors.
            report: Filled in while reading; a new one per file.

        Raises:
            TemperError: the file cannot be read, or rows are broken.
        """
        head = table_head(path, flag)
        bare = head is not None and not {cell.strip().lower() for cell in head} & set(self.labels)

        def parse(row: int, cells: Cells) -> Example:
            example = self.parse({name.strip().lower(): value for name, value in cells.items()})
            return replace(example, file=str(path), row=row)

        return good_rows(
            scan(path, self.columns if bare else None, flag),
            parse,
            f"{flag}={path}",
            skip_broken,
            report,
        )

    def correct(self, response: str, reference: str) -> bool:
        """Whether an answer is right; see the top of this file for what counts."""
        return self.right(response, reference)


def _sst2(cells: Cells) -> Example:
    sentence = _text(cells, ("sentence", "text"))
    return _classified(SENTIMENT, sentence, _class(cells, "label", SENTIMENTS, first=0))


def _ag_news(cells: Cells) -> Example:
    article = (
        _text(cells, ("text",))
        if "text" in cells
        else f"{_text(cells, ('title',))} {_text(cells, ('description',))}"
    )
    counted = next((name for name in ("class", "class index") if name in cells), None)
    label = (
        _class(cells, counted, TOPICS, first=1)
        if counted
        else _class(cells, "label", TOPICS, first=0)
    )
    return _classified(TOPIC, article, label)


def _gsm8k(cells: Cells) -> Example:
    question = _text(cells, ("question",))
    solution = _text(cells, ("answer",))
    number = final_number(solution.rpartition("####")[2]) if "####" in solution else None
    if number is None:
        raise RowError("column 'answer' does not end in '####' and a number")
    return Example(
        (Message("user", question),), (solution.replace("####", FINAL),), reference=str(number)
    )


def _classified(instruction: str, text: str, label: str) -> Example:
    return Example((Message("user", instruction, text),), (label,), reference=label)


def _text(cells: Cells, names: tuple[str, ...]) -> str:
    name = next((name for name in names if name in cells), None)
    if name is None:
        raise RowError(
            f"no column {' or '.join(map(repr, names))}; found"
            f" {', '.join(map(quote, list(cells)[:6])) or 'none'}"
        )
    text = read_text(cells[name], f"column {name!r}")
    if not text.strip():
        raise RowError(f"column {name!r} is empty")
    return text


def _class(cells: Cells, column: str, names: tuple[str, ...], first: int) -> str:
    """Class of a row, which the cell gives as its number, counted from ``first``, or its name."""
    if column not in cells:
        raise RowError(
            f"no column {column!r}; found {', '.join(map(quote, list(cells)[:6])) or 'none'}"
        )
    cell = cells[column]
    # Tables that once had an empty cell hold 1.0 for 1.
    whole = isinstance(cell, float) and cell.is_integer()
    value = str(int(cell) if whole else cell).strip()
    known = {str(number): name for number, name in enumerate(names, start=first)} | {
        name.lower(): name for name in names
    }
    if value.lower() not in known:
        hidden = " (a public test set without answers)" if value == "-1" else ""
        raise RowError(f"column {column!r} is {quote(value)}{hidden}; accepted: {', '.join(known)}")
    return known[value.lower()]


def same_class(response: str, reference: str) -> bool:
    """Whether the first word of an answer names the class, whatever its case and the punctuation
    around it.
    """
    words = response.split(maxsplit=1)
    word = words[0].strip(PUNCTUATION).lower() if words else ""
    return word in (reference.lower(), *ALSO.get(reference.lower(), ()))


def same_number(response: str, reference: str) -> bool:
    """Whether the final number of an answer equals the reference: 1,000 is 1000.00."""
    number = final_number(response)
    return number is not None and number == Decimal(reference)


def final_number(text: str) -> Decimal | None:
    """The first number after the last ``####`` or "the final answer is"; without a number there,
    the last number of the text.
    """
    marks = list(MARK.finditer(text))
    after = _numbers(text[marks[-1].end() :]) if marks else []
    return next(iter(after or _numbers(text)[-1:]), None)


def _numbers(text: str) -> list[Decimal]:
    return [Decimal(sign + digits.replace(",", "")) for sign, digits in NUMBER.findall(text)]


TASKS = {
    task.name: task
    for task in (
        Task("sst2", ("sentence", "label"), ("label",), _sst2, same_class),
        Task(
            "ag_news",
            ("class", "title", "description"),
            ("class", "class index", "label"),
            _ag_news,
            same_class,
        ),
        Task("gsm8k", ("question", "answer"), ("answer",), _gsm8k, same_number),
    )
}
