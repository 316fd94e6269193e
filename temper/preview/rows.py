"""Content of a preview as plain values: rows as text with roles, streams and histograms."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from temper.losses import IGNORE_INDEX

Role = Literal["prompt", "trained", "masked", "gap"]


@dataclass(frozen=True)
class TextSpan:
    """Text of consecutive tokens of one role.

    Attributes:
        text: Decoded text; line ends are marked, control characters made visible.
        role: ``prompt`` (before the first label), ``trained`` (labelled), ``masked`` (not labelled,
            after the first label), or ``gap`` (a note on omitted tokens).
        special: Whether these are special tokens of the tokenizer.
    """

    text: str
    role: Role
    special: bool = False


@dataclass(frozen=True)
class ShownSequence:
    """One sequence of a row, without padding."""

    name: str
    spans: tuple[TextSpan, ...]
    n_tokens: int
    n_trained: int


@dataclass(frozen=True)
class Row:
    """A row: its number from 1, its further columns as text, and its sequences."""

    number: int
    columns: str
    sequences: tuple[ShownSequence, ...]


@dataclass(frozen=True)
class Histogram:
    """Histogram of whole numbers.

    Attributes:
        title: What is counted.
        bars: (range as text, count).
        mean: Mean of the values.
    """

    title: str
    bars: tuple[tuple[str, int], ...]
    mean: float


@dataclass(frozen=True)
class Stream:
    """A training stream, or the evaluation prompts."""

    name: str
    facts: tuple[str, ...]
    rows: tuple[Row, ...]
    histograms: tuple[Histogram, ...]


@dataclass(frozen=True)
class Preview:
    """Everything that a preview shows.

    Attributes:
        title: Names of objective and data.
        facts: Tokenizer and chat template.
        streams: Streams that the objective reads, then the evaluation prompts.
        overlaps: (names of two sets of prompts, what they share).
        reports: (name, report of the datamodule on how its files were read).
    """

    title: str
    facts: tuple[str, ...]
    streams: tuple[Stream, ...]
    overlaps: tuple[tuple[str, str], ...]
    reports: tuple[tuple[str, str], ...]


# -- token ids as text

MAX_SHOWN_TOKENS = 600  # of longer sequences, the beginning and the end are shown
# Data files may hold control characters, which a terminal would execute.
_VISIBLE = (
    {c: chr(0x2400 + c) for c in range(32) if c != ord("\n")}
    | {0x7F: "␡"}
    | dict.fromkeys(range(0x80, 0xA0), "�")
)

# Properties of the token at a position: role, whether it is special, and the label if that is
# another token.
TokenProperties = tuple[Role, bool, int | None]


def text_spans(
    tokenizer: PreTrainedTokenizerBase, ids_T: Sequence[int], labels_T: Sequence[int] | None = None
) -> tuple[TextSpan, ...]:
    """Decode a sequence into spans of one role each.

    Args:
        tokenizer: Decodes the tokens.
        ids_T: Token ids without padding.
        labels_T: Labels, `IGNORE_INDEX` where nothing is trained; None: a prompt. A label that
            differs from its token is shown after an arrow.
    """
    labels_T = [IGNORE_INDEX] * len(ids_T) if labels_T is None else labels_T
    first_trained = next(
        (i for i, label in enumerate(labels_T) if label != IGNORE_INDEX), len(ids_T)
    )
    specials = set(tokenizer.all_special_ids)

    def properties(i: int) -> TokenProperties:
        special = ids_T[i] in specials
        if labels_T[i] != IGNORE_INDEX:
            return "trained", special, labels_T[i] if labels_T[i] != ids_T[i] else None
        return "prompt" if i < first_trained else "masked", special, None

    if len(ids_T) <= MAX_SHOWN_TOKENS:
        return tuple(_spans_of_range(tokenizer, ids_T, range(len(ids_T)), properties))
    head = range(MAX_SHOWN_TOKENS // 2)
    tail = range(len(ids_T) - MAX_SHOWN_TOKENS // 2, len(ids_T))
    return (
        *_spans_of_range(tokenizer, ids_T, head, properties),
        TextSpan(f" … {tail.start - head.stop:,} tokens … ", "gap"),
        *_spans_of_range(tokenizer, ids_T, tail, properties),
    )


def _spans_of_range(
    tokenizer: PreTrainedTokenizerBase,
    ids_T: Sequence[int],
    positions: range,
    properties: Callable[[int], TokenProperties],
) -> list[TextSpan]:
    spans = []
    ids = list(ids_T)
    before = ""
    for (role, special, other_label), group in groupby(positions, properties):
        end = list(group)[-1] + 1
        # Decode with all preceding tokens: alone, tokenizers drop the space before a word.
        text = _decode(tokenizer, ids[positions.start : end])
        shown = text.removeprefix(before)
        before = text
        if other_label is not None:
            shown += f"→{_decode(tokenizer, [other_label])}"
        spans.append(TextSpan(shown.translate(_VISIBLE).replace("\n", "↵\n"), role, special))
    return spans


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


# -- histograms

MAX_BINS = 10


def make_histogram(title: str, values_N: np.ndarray) -> Histogram:
    """Count whole numbers in at most `MAX_BINS` ranges of equal width."""
    low = int(values_N.min())
    high = int(values_N.max())
    step = -(-(high - low + 1) // MAX_BINS)
    counts = np.bincount((values_N - low) // step)
    starts = [low + i * step for i in range(len(counts))]
    ranges = [str(start) if step == 1 else f"{start}-{start + step - 1}" for start in starts]
    bars = tuple(zip(ranges, counts.tolist(), strict=True))
    return Histogram(title, bars, float(values_N.mean()))
