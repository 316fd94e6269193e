"""Rows that occur twice in a set, rows of one set that occur in another, and evaluation prompts
that a training file holds.

Sets are compared by hashes, not by texts kept in memory, so one of them may be larger than memory.
Texts are normalised first: case and white space do not count. N-grams are of words; there
punctuation does not count either. Rows are numbered from 1, in the order they come.
"""

import functools
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import TypeVar

import numpy as np

from temper.data.examples import Example

Pair = tuple[int, int]
T = TypeVar("T")
CASES = 5  # examples that a report keeps
N_WORDS = 8  # words of an n-gram, unless told otherwise
_CHUNK = 256  # rows whose n-grams are looked up at once
_WORD = re.compile(r"[^\W_]+")


# -- reports


@dataclass(frozen=True)
class Duplicates:
    """Rows of a set that repeat an earlier one.

    Args:
        rows: Rows looked at.
        repeats: Rows that repeat an earlier row.
        cases: The first of them: (row, the row it repeats).
    """

    rows: int
    repeats: int
    cases: tuple[Pair, ...]

    def __str__(self) -> str:
        return (
            f"{self.repeats:,} of {self.rows:,} rows repeat an earlier"
            f" row{_case('row {} repeats row {}', self.cases)}"
        )


@dataclass(frozen=True)
class Overlap:
    """Rows of a set B that are known from a set A.

    Args:
        rows: Rows of B.
        exact: Rows of B that are also rows of A.
        shared: Rows of B that share ``n`` words in a row with a row of A; a row shorter than that
            counts if all its words are all the words of a row of A. Exact ones are among them,
            unless they have no words.
        n: Words of an n-gram.
        exact_cases: The first exact ones: (row of B, first such row of A).
        shared_cases: The first that share an n-gram and are not exact: (row of B, first such row of
            A).
    """

    rows: int
    exact: int
    shared: int
    n: int
    exact_cases: tuple[Pair, ...]
    shared_cases: tuple[Pair, ...]

    @property
    def in_words(self) -> str:
        """The exact ones alone, in a line."""
        return (
            f"{self.exact:,} of {self.rows:,} rows are in both"
            f" sets{_case('row {} is row {}', self.exact_cases)}"
        )

    def __str__(self) -> str:
        return (
            f"{self.in_words}, {self.shared:,} share {self.n} words in a"
            f" row{_case('row {} with row {}', self.shared_cases)}"
        )


@dataclass(frozen=True)
class Leaks:
    """Evaluation prompts that a training file holds, or shares words with.

    Args:
        found: The counts.
        example: File and row of an evaluation prompt, and the row of the training file that it
            shares most with.
    """

    found: Overlap
    example: tuple[str, int, int] | None

    def __str__(self) -> str:
        counts = (
            f"{self.found.exact:,} of {self.found.rows:,} evaluation prompts are training"
            " prompts too"
        )
        shared = f"{self.found.shared:,} share {self.found.n} words in a row with one"
        if self.example is None:
            return f"{counts}, {shared}"
        file, row, training_row = self.example
        return f"{counts}, {shared} (for example row {row} of {file} and row {training_row})"


# -- rows that repeat


def repeats(texts: Iterable[str]) -> Iterator[Pair]:
    """Every row that repeats an earlier one, with the row it repeats; keeps a hash per different
    text.
    """
    first: dict[int, int] = {}
    for number, text in enumerate(texts, 1):
        earlier = first.setdefault(_hash(normalise(text)), number)
        if earlier != number:
            yield number, earlier


def duplicates(texts: Iterable[str]) -> Duplicates:
    """Count the rows of a set that repeat an earlier one; texts are read once."""
    counted = _Counted(texts)
    found = 0
    cases: list[Pair] = []
    for pair in repeats(counted):
        found += 1
        if found <= CASES:
            cases.append(pair)
    return Duplicates(counted.n, found, tuple(cases))


# -- rows of one set in another


def overlap(a: Iterable[str], b: Iterable[str], n: int = N_WORDS) -> Overlap:
    """Which rows of ``b`` are known from ``a``; each is read once, and only hashes of ``b`` are
    held.

    Args:
        a: The set that may give something away, such as the training prompts; it may be of any
            size.
        b: The set that should be new, such as the evaluation prompts.
        n: Words of an n-gram.
    """
    known = _Known(b, n)
    for offset, chunk in _chunks(a):
        known.look_up([_Hashed(text, n) for text in chunk], offset)
    return known.found()


def find_leaks(
    training: Iterable[Example], evaluation: Mapping[str, Sequence[Example]]
) -> dict[str, Leaks]:
    """Search a training file for evaluation prompts; the file is read once for all sets of them,
    and may be larger than memory.

    The words that all prompts of a set begin with (an instruction, say) are left out of the
    comparison with that set.

    Args:
        training: Examples of the training file.
        evaluation: Sets of evaluation prompts, by name.

    Returns:
        The leaks of every set, by name.
    """
    prompts = {
        name: [normalise(example.conversation) for example in examples]
        for name, examples in evaluation.items()
    }
    openings = {name: _opening(texts) for name, texts in prompts.items()}
    sets = {
        name: _Known([text.removeprefix(openings[name]) for text in texts], N_WORDS)
        for name, texts in prompts.items()
    }
    rows = array("q")  # number of every training row in its file
    for offset, chunk in _chunks(training):
        rows.extend(example.row for example in chunk)
        texts = [normalise(example.conversation) for example in chunk]
        # Most rows begin with no set's opening: they are hashed once for all sets.
        hashed = {text: _Hashed(text, N_WORDS) for text in texts}
        for name, known in sets.items():
            rest = [text.removeprefix(openings[name]) for text in texts]
            hashed |= {text: _Hashed(text, N_WORDS) for text in rest if text not in hashed}
            known.look_up([hashed[text] for text in rest], offset)
    return {name: _leaks(known.found(), rows, evaluation[name]) for name, known in sets.items()}


def _leaks(found: Overlap, rows: Sequence[int], evaluation: Sequence[Example]) -> Leaks:
    case = next(iter((*found.exact_cases, *found.shared_cases)), None)
    if case is None:
        return Leaks(found, None)
    tested = evaluation[case[0] - 1]
    return Leaks(found, (tested.file, tested.row, rows[case[1] - 1]))


def _chunks(rows: Iterable[T]) -> Iterator[tuple[int, list[T]]]:
    """Some rows at a time, with the number of rows before them."""
    rest = iter(rows)
    offset = 0
    while chunk := list(islice(rest, _CHUNK)):
        yield offset, chunk
        offset += len(chunk)


def _opening(questions: Sequence[str]) -> str:
    """Whole words that several questions all begin with, if every question goes on after them."""
    shared = re.match(r"(.*\s)?", _common(questions), re.DOTALL)
    words = shared.group() if shared else ""
    return words if all(question[len(words) :].strip() for question in questions) else ""


def _common(texts: Sequence[str]) -> str:
    """The longest beginning that several texts have in common."""
    if len(texts) < 2:
        return ""
    first = min(texts)
    last = max(texts)
    return first[
        : next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    ]


def normalise(text: str) -> str:
    """A text whose case and white space do not count."""
    return " ".join(text.casefold().split())


# -- hashes


class _Hashed:
    """Hashes of a text: of the whole, and of its n-grams."""

    def __init__(self, text: str, n: int) -> None:
        self.whole = np.array([_hash(normalise(text))], np.uint64)
        self.ngrams = _ngrams(text, n)


class _Known:
    """The set B, and which of its rows have been met in A."""

    def __init__(self, texts: Iterable[str], n: int) -> None:
        self.n = n
        self.n_rows = 0
        self.whole = _Index()
        self.ngrams = _Index()
        for text in texts:
            hashed = _Hashed(text, n)
            self.whole.add(hashed.whole)
            self.ngrams.add(hashed.ngrams)
            self.n_rows += 1

    def look_up(self, rows: Sequence[_Hashed], offset: int) -> None:
        """Mark what these rows of A share with B; the first of them is row ``offset + 1``."""
        self.whole.look_up([row.whole for row in rows], offset)
        self.ngrams.look_up([row.ngrams for row in rows], offset)

    def found(self) -> Overlap:
        """Which rows of B are known from the rows of A that were looked up."""
        exact = self.whole.found()
        shared = self.ngrams.found()
        near = {row: seen for row, seen in shared.items() if row not in exact}
        return Overlap(self.n_rows, len(exact), len(shared), self.n, _first(exact), _first(near))


class _Index:
    """Hashes of the rows of B, and the first row of A that has each."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> None:
        """The hashes of the next row."""
        self.rows.append(hashes)

    @functools.cached_property
    def keys(self) -> np.ndarray:
        return np.unique(np.concatenate([np.empty(0, np.uint64), *self.rows]))

    @functools.cached_property
    def first(self) -> np.ndarray:
        """Row of A of every key; 0: none."""
        return np.zeros(len(self.keys), np.int64)

    def look_up(self, rows: list[np.ndarray], offset: int) -> None:
        """Mark the keys that rows of A have; the first of them is row ``offset + 1``."""
        if not len(self.keys):
            return
        hashes = np.concatenate(rows)
        numbers = np.repeat(np.arange(len(rows)) + offset + 1, [len(row) for row in rows])
        place = np.searchsorted(self.keys, hashes).clip(max=len(self.keys) - 1)
        hit = (self.keys[place] == hashes) & (self.first[place] == 0)
        # Written back to front, so that the first row of A with a key is the one that stays.
        self.first[place[hit][::-1]] = numbers[hit][::-1]

    def found(self) -> dict[int, int]:
        """Rows of B with a key that A has, and the first row of A with one."""
        seen = [self.first[np.searchsorted(self.keys, row)] for row in self.rows]
        return {n: int(row[row > 0].min()) for n, row in enumerate(seen, 1) if row.any()}


class _Counted:
    """An iterable that knows how much of it was read."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts
        self.n = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.n += 1
            yield text


def _ngrams(text: str, n: int) -> np.ndarray:
    """Hashes of the n-grams of a text; of all its words, if there are fewer than n."""
    words = np.array([_word_hash(word) for word in _WORD.findall(text.casefold())], np.uint64)
    if len(words) == 0:
        return words
    width = min(n, len(words))
    # A sum of random words under random odd factors, modulo 2^64: as good as a hash of the joined
    # words, and one pass for all.
    return np.convolve(words, _factors(width), "valid")


@functools.cache
def _factors(width: int) -> np.ndarray:
    return np.array([_hash(f"{width} {place}") | 1 for place in range(width)], np.uint64)


@functools.lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return _hash(word)


def _hash(text: str) -> int:
    # A lone surrogate is no valid text, and must not end a report.
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _first(found: dict[int, int]) -> tuple[Pair, ...]:
    return tuple(list(found.items())[:CASES])


def _case(words: str, cases: tuple[Pair, ...]) -> str:
    return f" ({words.format(*cases[0])})" if cases else ""
