"""From data that have been set up to what is shown of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from temper.data import Batch, BatchSource
from temper.data.examples import Message
from temper.data.overlap import Duplicates, Pair, duplicates, overlap
from temper.data.packing import Fill
from temper.data.rows import PADDED
from temper.losses import IGNORE_INDEX
from temper.preview.rows import Preview, Row, Shown, Stream, histogram, pieces

# MERGED from temper.preview.report: Prompts as text, and what sets of them have in common.


class Renders(Protocol):
    """A chat template."""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation up to the answer."""
        ...


def prompt_texts(
    tokenizer: PreTrainedTokenizerBase,
    sets: dict[str, list[np.ndarray]],
    template: Renders | None = None,
) -> dict[str, list[str]]:
    """Sets of prompt ids as text, without what a template puts around all of them, such as a system
    prompt: that is no overlap.

    Args:
        tokenizer: Decodes.
        sets: Prompts by the name of their set.
        template: What rendered them; None: whatever all of them begin and end with is left out.
    """
    everything = [ids for prompts in sets.values() for ids in prompts]
    # Two prompts that have nothing in common but the template: words that all questions share are
    # not cut.
    rendered = (
        []
        if template is None
        else [np.array(template.prompt_ids((Message("user", word),))) for word in ("a", "b")]
    )
    start, end = (
        _common([*rendered, *everything]),
        _common([ids[::-1] for ids in [*rendered, *everything]]),
    )
    if any(len(ids) <= start + end for ids in everything):
        start = end = 0  # the prompts are all the same, or one is a part of the others

    def text(ids: np.ndarray) -> str:
        return str(tokenizer.decode(ids[start : len(ids) - end].tolist(), skip_special_tokens=True))

    return {name: [text(ids) for ids in prompts] for name, prompts in sets.items()}


def repeated(texts: list[str], numbers_N: np.ndarray) -> Duplicates:
    """Repeats, their cases by the rows' own numbers instead of their places among those that were
    read.
    """
    found = duplicates(texts)
    return replace(found, cases=_own(found.cases, numbers_N, numbers_N))


def compare(
    texts: dict[str, list[str]], numbers: dict[str, np.ndarray], in_a_row: bool
) -> Iterator[tuple[str, str]]:
    """Every set held against each before it: which two, and what they share.

    Args:
        texts: Sets of prompts.
        numbers: The rows' own numbers.
        in_a_row: Tell of shared words in a row too.
    """
    names = list(texts)
    for j, b in enumerate(names):
        for a in names[:j]:
            found = overlap(texts[a], texts[b])
            exact, near = (
                _own(cases, numbers[b], numbers[a])
                for cases in (found.exact_cases, found.shared_cases)
            )
            found = replace(found, exact_cases=exact, shared_cases=near)
            yield f"{b} (B) against {a} (A)", str(found) if in_a_row else found.in_words


def _own(cases: tuple[Pair, ...], *numbers: np.ndarray) -> tuple[Pair, ...]:
    first, second = numbers
    return tuple((int(first[one - 1]), int(second[other - 1])) for one, other in cases)


def _common(rows: list[np.ndarray]) -> int:
    """Length of the longest common beginning."""
    common = rows[0]
    for ids in rows:
        width = min(len(common), len(ids))
        different = np.flatnonzero(common[:width] != ids[:width])
        common = common[: different[0] if len(different) else width]
    return len(common)


# MERGED from temper.preview.report: One pass over a stream: lengths, prompts and the first rows, in
# as many numbers as fit.


FILL_BATCHES = 50  # batches that the fill rate is measured on


@dataclass(frozen=True)
class Scan:
    """What was read of a stream.

    Args:
        rows_in_pass: Rows of a whole pass.
        numbers_N: Row numbers of what was read, from 1, rising.
        lengths_S: Tokens of every sequence.
        trained_S: Those with a label.
        prompts: Prompt ids of every row read, in the order of ``numbers_N``.
        untrained: Rows of which no sequence has a label.
        first: The first rows of the first pass, one batch of one row each.
        fill: Share of computed tokens that are no padding, as batches come.
        packed_fill: The same, packed; None if the run does not pack.
    """

    rows_in_pass: int
    numbers_N: np.ndarray
    lengths_S: np.ndarray
    trained_S: np.ndarray
    prompts: list[np.ndarray]
    untrained: int
    first: list[Batch]
    fill: float
    packed_fill: float | None


def scan_source(
    source: BatchSource,
    n_first: int,
    limit: int,
    micro_batch_size: int | None = None,
    hidden_size: int | None = None,
) -> Scan:
    """Read the first pass of a stream, or its first ``limit`` rows.

    Args:
        source: The stream.
        n_first: Rows to keep.
        limit: Rows to read.
        micro_batch_size: Rows that go through the network together; None: a batch.
        hidden_size: Width of the network that packs them; None: it does not.
    """
    numbers: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    prompts: list[np.ndarray] = []
    first: list[Batch] = []
    untrained = 0
    padded, packed = Fill(), Fill(hidden_size)
    for k in range(min(source.batches_per_pass, max(1, -(-limit // source.batch_size)))):
        rows = source.batch(k)
        present_BKT, labelled_BKT = (
            _sequences(rows["attention_mask"]).bool(),
            _sequences(rows["labels"]) != IGNORE_INDEX,
        )
        lengths_BK = present_BKT.sum(-1).numpy()
        lengths.append(lengths_BK.ravel())
        trained.append(labelled_BKT.sum(-1).numpy().ravel())
        untrained += int((~labelled_BKT.any(-1).any(-1)).sum())
        numbers.append(rows["ids"].numpy() + 1)
        prompts += list(prompt_ids(rows))
        first += [_single_row(rows, i) for i in range(min(n_first - len(first), len(lengths_BK)))]
        if k < FILL_BATCHES:
            padded.add(lengths_BK, micro_batch_size)
            packed.add(lengths_BK, micro_batch_size)
    every = np.concatenate(numbers)
    order = np.argsort(every, kind="stable")
    return Scan(
        rows_in_pass=source.batches_per_pass * source.batch_size,
        numbers_N=every[order],
        lengths_S=np.concatenate(lengths),
        trained_S=np.concatenate(trained),
        prompts=[prompts[i] for i in order],
        untrained=untrained,
        first=first,
        fill=padded.rate,
        packed_fill=None if hidden_size is None else packed.rate,
    )


def prompt_ids(rows: Batch) -> Iterator[np.ndarray]:
    """Tokens of every row before the first label of its first sequence; all of them, if it has
    none.
    """
    ids_BT, present_BT = (
        _sequences(rows["input_ids"])[:, 0],
        _sequences(rows["attention_mask"])[:, 0].bool(),
    )
    if "labels" in rows:
        present_BT = present_BT & (
            (_sequences(rows["labels"])[:, 0] != IGNORE_INDEX).cumsum(-1) == 0
        )
    for ids_T, present_T in zip(ids_BT, present_BT, strict=True):
        yield ids_T[present_T].numpy().astype(np.int32)


def _sequences(tensor: Tensor) -> Tensor:
    """``B x T`` as ``B x 1 x T``."""
    return tensor.unsqueeze(1) if tensor.ndim == 2 else tensor


def _single_row(rows: Batch, index: int) -> Batch:
    return {name: torch.as_tensor(value[index]) for name, value in rows.items()}


# Words in a row say nothing where there are hardly any different words, as in the synthetic
# language.
SMALL_VOCABULARY = 1000
# What the two sequences of a row are, in the streams of this project.
NAMES = {
    "pairs": ("chosen", "rejected"),
    "kto": ("answer", "answer of another row"),
    "forget": ("to forget", "in its place"),
    "harmful_pairs": ("carried out", "refused"),
    "heldout_pairs": ("refused", "carried out"),
}
WHOSE = {"auto": "auto, the tokenizer's own"}


class Data(Protocol):
    """What is read of a datamodule; ``format.name`` and ``reports`` are read where there are
    any.
    """

    tokenizer: PreTrainedTokenizerBase
    sources: dict[str, BatchSource]
    eval_rows: Batch
    eval_kinds: list[str]


def look(
    data: Data,
    streams: Sequence[str],
    title: str,
    rows: int = 5,
    limit: int = 20_000,
    micro_batch_size: int | None = None,
    hidden_size: int | None = None,
) -> Preview:
    """Read data that have been set up.

    Args:
        data: A datamodule.
        streams: Names of the streams to show.
        title: Heading.
        rows: Rows to show of each stream, and evaluation prompts of each kind.
        limit: Rows of a stream that lengths, repeats and overlaps are counted over.
        micro_batch_size: Rows that go through the network together; None: a batch.
        hidden_size: Width of the network that packs them; None: it does not.
    """
    scans = {
        name: scan_source(data.sources[name], rows, limit, micro_batch_size, hidden_size)
        for name in streams
    }
    prompts = {name: scan.prompts for name, scan in scans.items()} | {
        "evaluation": list(prompt_ids(data.eval_rows))
    }
    texts = prompt_texts(data.tokenizer, prompts, getattr(data, "format", None))
    numbers = {name: scan.numbers_N for name, scan in scans.items()} | {
        "evaluation": data.eval_rows["ids"].numpy() + 1
    }
    seen = [
        _stream(data, name, scan, repeated(texts[name], numbers[name]))
        for name, scan in scans.items()
    ]
    if texts["evaluation"]:
        seen.append(_evaluation(data, rows, repeated(texts["evaluation"], numbers["evaluation"])))
    return Preview(
        title=title,
        facts=_facts(data),
        streams=tuple(seen),
        overlaps=tuple(
            compare(
                {name: found for name, found in texts.items() if found},
                numbers,
                in_a_row=len(data.tokenizer) >= SMALL_VOCABULARY,
            )
        ),
        reports=tuple((name, str(report)) for name, report in getattr(data, "reports", {}).items()),
    )


def _facts(data: Data) -> tuple[str, ...]:
    tokenizer = data.tokenizer
    template = getattr(getattr(data, "format", None), "name", None)
    ends = f"end of text {tokenizer.eos_token!r}, padding {tokenizer.pad_token!r}"
    named = (
        f"template: {WHOSE.get(template, template)}"
        if template
        else "template: none (the data write tokens themselves)"
    )
    numbers = (
        "rows are numbered from 1, as they are held: rows left out when they were read have no"
        " number"
    )
    return (
        named,
        f"tokenizer: {type(tokenizer).__name__}, {len(tokenizer):,} tokens, {ends}",
        numbers,
    )


def _stream(data: Data, name: str, scan: Scan, repeats: Duplicates) -> Stream:
    source, read = data.sources[name], len(scan.numbers_N)
    cut = "" if read == scan.rows_in_pass else f" ({read:,} of them read for the figures below)"
    facts = [
        (
            f"{scan.rows_in_pass:,} rows in a pass: {source.batches_per_pass:,} x"
            f" {source.batch_size}{cut}"
        ),
        f"computed tokens that are no padding: {scan.fill:.0%}"
        + ("" if scan.packed_fill is None else f", packed {scan.packed_fill:.0%}"),
        f"prompts: {repeats}",
    ]
    if scan.untrained:
        facts.append(
            f"{scan.untrained:,} rows have no trained token: they are computed and teach nothing"
        )
    bars = (
        histogram("Tokens of a sequence", scan.lengths_S),
        histogram("Trained tokens of a sequence", scan.trained_S),
    )
    return Stream(
        name, tuple(facts), tuple(_row(data.tokenizer, name, row) for row in scan.first), bars
    )


def _evaluation(data: Data, rows: int, repeats: Duplicates) -> Stream:
    kinds_B, lengths_B = data.eval_rows["kind"], data.eval_rows["attention_mask"].sum(-1)
    counts = ", ".join(
        f"{int((kinds_B == i).sum()):,} {kind}" for i, kind in enumerate(data.eval_kinds)
    )
    shown = [
        i
        for kind in range(len(data.eval_kinds))
        for i in (kinds_B == kind).nonzero()[:rows, 0].tolist()
    ]
    seen = []
    for i in shown:
        row = {name: value[i] for name, value in data.eval_rows.items() if name != "kind"}
        seen.append(
            replace(_row(data.tokenizer, "evaluation", row), marks=data.eval_kinds[int(kinds_B[i])])
        )
    bars = (histogram("Tokens of a prompt", lengths_B.numpy()),)
    return Stream(
        "evaluation",
        (f"{len(kinds_B):,} prompts: {counts}", f"prompts: {repeats}"),
        tuple(seen),
        bars,
    )


def _row(tokenizer: PreTrainedTokenizerBase, stream: str, row: Batch) -> Row:
    parts = {
        name: row[name] if row[name].ndim == 2 else row[name].unsqueeze(0)
        for name in PADDED
        if name in row
    }
    names = NAMES.get(stream, ("first", "second")) if len(parts["input_ids"]) > 1 else ("",)
    sequences = []
    for k, present_T in enumerate(parts["attention_mask"].bool()):
        ids = parts["input_ids"][k][present_T].tolist()
        labels = parts["labels"][k][present_T].tolist() if "labels" in parts else None
        trained = sum(label != IGNORE_INDEX for label in labels or [])
        name = names[k] if k < len(names) else f"number {k + 1}"
        sequences.append(Shown(name, pieces(tokenizer, ids, labels), len(ids), trained))
    marks = ", ".join(
        f"{name}: {_mark(value)}"
        for name, value in row.items()
        if name not in (*PADDED, "ids", "lengths") and _is_mark(value)
    )
    return Row(int(row["ids"]) + 1, marks, tuple(sequences))


def _is_mark(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _mark(value: Tensor) -> str:
    found = value.item()
    return {True: "yes", False: "no"}[found] if isinstance(found, bool) else f"{found:.4g}"
