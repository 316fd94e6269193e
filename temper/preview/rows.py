"""Rows as a preview shows them: text whose pieces say what training does with them, and
histograms.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from temper.losses import IGNORE_INDEX

# MERGED from temper.preview.report: Token ids as text whose parts say what training does with them.


Role = Literal["prompt", "trained", "masked", "gap"]
SHOWN = 600  # tokens of a sequence that are shown: its beginning and its end
# A terminal obeys control characters, and what is shown here is a user's file.
_VISIBLE = (
    {c: chr(0x2400 + c) for c in range(32) if c != ord("\n")}
    | {0x7F: "␡"}
    | dict.fromkeys(range(0x80, 0xA0), "�")
)


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one role.

    Args:
        text: Decoded; ends of lines are marked, control characters made visible.
        role: ``prompt`` (before anything trained), ``trained``, ``masked`` (no label, after
            something trained), or ``gap`` (words about tokens left out).
        special: Special tokens of the tokenizer.
    """

    text: str
    role: Role
    special: bool = False


def pieces(
    tokenizer: PreTrainedTokenizerBase, ids_T: Sequence[int], labels_T: Sequence[int] | None = None
) -> tuple[Piece, ...]:
    """One sequence without padding.

    Args:
        tokenizer: Decodes.
        ids_T: Token ids.
        labels_T: Labels, `IGNORE_INDEX` where nothing is trained; None: a prompt. A label that is
            another token than the one that stands there is shown behind an arrow.
    """
    labels_T = [IGNORE_INDEX] * len(ids_T) if labels_T is None else labels_T
    first_trained = next(
        (i for i, label in enumerate(labels_T) if label != IGNORE_INDEX), len(ids_T)
    )
    specials = set(tokenizer.all_special_ids)

    def look(i: int) -> tuple[Role, bool, int | None]:
        role: Role = (
            "trained"
            if labels_T[i] != IGNORE_INDEX
            else "prompt"
            if i < first_trained
            else "masked"
        )
        instead = labels_T[i] if role == "trained" and labels_T[i] != ids_T[i] else None
        return role, ids_T[i] in specials, instead

    head = len(ids_T) if len(ids_T) <= SHOWN else SHOWN // 2
    tail = range(max(head, len(ids_T) - SHOWN // 2), len(ids_T))
    result = _runs(tokenizer, ids_T, range(head), look)
    if tail:
        result += [
            Piece(f" … {tail.start - head:,} tokens … ", "gap"),
            *_runs(tokenizer, ids_T, tail, look),
        ]
    return tuple(result)


def _runs(
    tokenizer: PreTrainedTokenizerBase,
    ids_T: Sequence[int],
    places: range,
    look: Callable[[int], tuple[Role, bool, int | None]],
) -> list[Piece]:
    """Pieces of consecutive tokens that look alike."""
    result, ids, before = [], list(ids_T), ""
    for (role, special, instead), group in groupby(places, look):
        end = list(group)[-1] + 1
        # Decoded with all that comes before it: alone, tokenizers drop the space in front of a
        # word.
        text = _decode(tokenizer, ids[places.start : end])
        shown, before = text.removeprefix(before), text
        if instead is not None:
            shown += f"→{_decode(tokenizer, [instead])}"
        result.append(Piece(shown.translate(_VISIBLE).replace("\n", "↵\n"), role, special))
    return result


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


# MERGED from temper.preview.report: What a preview consists of: plain values, for a terminal and a
# page alike.


BINS = 10


@dataclass(frozen=True)
class Shown:
    """A sequence of a row, without padding."""

    name: str
    pieces: tuple[Piece, ...]
    n_tokens: int
    n_trained: int


@dataclass(frozen=True)
class Row:
    """A row: its number from 1, its marks, its sequences."""

    number: int
    marks: str
    sequences: tuple[Shown, ...]


@dataclass(frozen=True)
class Histogram:
    """Counts of values in ranges, and the mean.

    Args:
        title: What is counted.
        bars: (range in words, count).
        mean: Mean value.
    """

    title: str
    bars: tuple[tuple[str, int], ...]
    mean: float


@dataclass(frozen=True)
class Stream:
    """A training stream, or the evaluation prompts, which have no batches."""

    name: str
    facts: tuple[str, ...]
    rows: tuple[Row, ...]
    histograms: tuple[Histogram, ...]


@dataclass(frozen=True)
class Preview:
    """Everything that a preview shows.

    Args:
        title: Names of objective and data.
        facts: Tokenizer and template.
        streams: Those that the objective reads, then the evaluation prompts.
        overlaps: (which sets, what they share).
        reports: (name, what the data say of their own reading).
    """

    title: str
    facts: tuple[str, ...]
    streams: tuple[Stream, ...]
    overlaps: tuple[tuple[str, str], ...]
    reports: tuple[tuple[str, str], ...]


def histogram(title: str, values_N: np.ndarray) -> Histogram:
    """At most `BINS` ranges of whole numbers."""
    low, high = int(values_N.min()), int(values_N.max())
    step = -(-(high - low + 1) // BINS)
    counts = np.bincount((values_N - low) // step)
    words = [
        str(low + i * step) if step == 1 else f"{low + i * step}-{low + (i + 1) * step - 1}"
        for i in range(len(counts))
    ]
    return Histogram(title, tuple(zip(words, counts.tolist(), strict=True)), float(values_N.mean()))
