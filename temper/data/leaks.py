"""Prompts of a training file that are evaluation prompts too, by the numbers of their rows."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from temper.data.examples import Example
from temper.data.overlap import Overlap, normalise, overlap


@dataclass(frozen=True)
class Leaks:
    """What evaluation prompts share with the prompts of a training file.

    Args:
        found: The counts.
        example: File and row of an evaluation prompt, and the row of the training file that it shares most with.
    """

    found: Overlap
    example: tuple[str, int, int] | None

    def __str__(self) -> str:
        counts = f"{self.found.exact:,} of {self.found.rows:,} evaluation prompts are training prompts too"
        shared = f"{self.found.shared:,} share {self.found.n} words in a row with one"
        file, row, training_row = self.example or ("", 0, 0)
        return f"{counts}, {shared}" + (f" (for example row {row} of {file} and row {training_row})" if file else "")


def find_leaks(training: Iterable[Example], evaluation: Sequence[Example]) -> Leaks:
    """Hold a training file against evaluation prompts; it may be larger than memory.

    What all evaluation prompts begin with (an instruction, say) is left out of the comparison.
    """
    asked = [normalise(example.conversation) for example in evaluation]
    opening = _opening(asked)
    rows: list[int] = []

    def texts() -> Iterator[str]:
        for example in training:
            rows.append(example.row)
            yield normalise(example.conversation).removeprefix(opening)

    found = overlap(texts(), [text.removeprefix(opening) for text in asked])
    case = next(iter((*found.exact_cases, *found.shared_cases)), None)
    if case is None:
        return Leaks(found, None)
    tested = evaluation[case[0] - 1]
    return Leaks(found, (tested.file, tested.row, rows[case[1] - 1]))


def _opening(questions: Sequence[str]) -> str:
    """Whole words that several questions all begin with, if every question goes on after them."""
    shared = re.match(r"(.*\s)?", _common(questions), re.DOTALL)
    words = shared.group() if shared else ""
    return words if all(question[len(words) :].strip() for question in questions) else ""


def _common(texts: Sequence[str]) -> str:
    """What several texts all begin with."""
    if len(texts) < 2:
        return ""
    first, last = min(texts), max(texts)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
