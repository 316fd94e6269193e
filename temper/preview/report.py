"""Build a preview from a datamodule that is set up: read its streams, find repeats and overlaps."""

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
from temper.preview.rows import Preview, Row, ShownSequence, Stream, make_histogram, text_spans

# Below this vocabulary size, as in the synthetic language, all texts share words in a row.
SMALL_VOCABULARY = 1000
# Names of the sequences of a row, by stream.
SEQUENCE_NAMES = {
    "pairs": ("chosen", "rejected"),
    "kto": ("answer", "answer of another row"),
    "forget": ("to forget", "substitute"),
    "harmful_pairs": ("compliance", "refusal"),
    "heldout_pairs": ("refusal", "compliance"),
}
TEMPLATE_NAMES = {"auto": "auto, the tokenizer's own"}


class PreviewData(Protocol):
    """A datamodule as far as a preview reads it; ``format.name`` and ``reports`` are optional."""

    tokenizer: PreTrainedTokenizerBase
    sources: dict[str, BatchSource]
    eval_rows: Batch
    eval_kinds: list[str]


class ChatTemplate(Protocol):
    """A chat template."""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to the answer."""
        ...


def build_preview(
    data: PreviewData,
    streams: Sequence[str],
    title: str,
    rows: int = 5,
    limit: int = 20_000,
    micro_batch_size: int | None = None,
    hidden_size: int | None = None,
) -> Preview:
    """Build a preview of data that are set up.

    Args:
        data: The datamodule.
        streams: Names of the streams to show.
        title: Heading.
        rows: Rows to show of each stream, and evaluation prompts of each kind.
        limit: Rows of a stream to read for lengths, repeats and overlaps.
        micro_batch_size: Rows of a micro-batch; None: a whole batch.
        hidden_size: Width of the network if it packs rows; None: no packing.
    """
    scans = {
        name: scan_source(data.sources[name], rows, limit, micro_batch_size, hidden_size)
        for name in streams
    }
    prompts = {name: scan.prompts for name, scan in scans.items()}
    prompts["evaluation"] = list(extract_prompts(data.eval_rows))
    texts = decode_prompts(data.tokenizer, prompts, getattr(data, "format", None))
    numbers = {name: scan.numbers_N for name, scan in scans.items()}
    numbers["evaluation"] = data.eval_rows["ids"].numpy() + 1
    shown = [
        _preview_stream(data, name, scan, find_repeats(texts[name], numbers[name]))
        for name, scan in scans.items()
    ]
    if texts["evaluation"]:
        repeats = find_repeats(texts["evaluation"], numbers["evaluation"])
        shown.append(_preview_evaluation(data, rows, repeats))
    overlaps = find_overlaps(
        {name: found for name, found in texts.items() if found},
        numbers,
        shared_words=len(data.tokenizer) >= SMALL_VOCABULARY,
    )
    reports = getattr(data, "reports", {})
    return Preview(
        title=title,
        facts=_tokenizer_facts(data),
        streams=tuple(shown),
        overlaps=tuple(overlaps),
        reports=tuple((name, str(report)) for name, report in reports.items()),
    )


def _tokenizer_facts(data: PreviewData) -> tuple[str, ...]:
    tokenizer = data.tokenizer
    template = getattr(getattr(data, "format", None), "name", None)
    template_fact = "template: none (the data write token ids)"
    if template:
        template_fact = f"template: {TEMPLATE_NAMES.get(template, template)}"
    return (
        template_fact,
        f"tokenizer: {type(tokenizer).__name__}, {len(tokenizer):,} tokens, end of text"
        f" {tokenizer.eos_token!r}, padding {tokenizer.pad_token!r}",
        "rows are numbered from 1; rows that were left out when files were read have no number",
    )


def _preview_stream(data: PreviewData, name: str, scan: "Scan", repeats: Duplicates) -> Stream:
    source = data.sources[name]
    n_read = len(scan.numbers_N)
    limited = ""
    if n_read < scan.rows_in_pass:
        limited = f" (statistics are over the first {n_read:,})"
    packed = "" if scan.packed_fill is None else f", packed {scan.packed_fill:.0%}"
    facts = [
        f"{scan.rows_in_pass:,} rows in a pass: {source.batches_per_pass:,} x"
        f" {source.batch_size}{limited}",
        f"computed tokens that are not padding: {scan.fill:.0%}{packed}",
        f"prompts: {repeats}",
    ]
    if scan.n_untrained:
        facts.append(
            f"{scan.n_untrained:,} rows have no trained token: they cost compute and train nothing"
        )
    histograms = (
        make_histogram("Tokens of a sequence", scan.lengths_S),
        make_histogram("Trained tokens of a sequence", scan.trained_S),
    )
    rows = tuple(_preview_row(data.tokenizer, name, row) for row in scan.first)
    return Stream(name, tuple(facts), rows, histograms)


def _preview_evaluation(data: PreviewData, rows_per_kind: int, repeats: Duplicates) -> Stream:
    kinds_B = data.eval_rows["kind"]
    lengths_B = data.eval_rows["attention_mask"].sum(-1)
    rows = []
    counts = []
    for kind, kind_name in enumerate(data.eval_kinds):
        places = (kinds_B == kind).nonzero()[:, 0].tolist()
        counts.append(f"{len(places):,} {kind_name}")
        for i in places[:rows_per_kind]:
            row = {name: value[i] for name, value in data.eval_rows.items() if name != "kind"}
            shown = _preview_row(data.tokenizer, "evaluation", row)
            rows.append(replace(shown, columns=kind_name))
    return Stream(
        "evaluation",
        (f"{len(kinds_B):,} prompts: {', '.join(counts)}", f"prompts: {repeats}"),
        tuple(rows),
        (make_histogram("Tokens of a prompt", lengths_B.numpy()),),
    )


def _preview_row(tokenizer: PreTrainedTokenizerBase, stream: str, row: Batch) -> Row:
    tensors = {
        name: row[name] if row[name].ndim == 2 else row[name].unsqueeze(0)
        for name in PADDED
        if name in row
    }
    names: tuple[str, ...] = ("",)
    if len(tensors["input_ids"]) > 1:
        names = SEQUENCE_NAMES.get(stream, ("first", "second"))
    sequences = []
    for k, present_T in enumerate(tensors["attention_mask"].bool()):
        ids = tensors["input_ids"][k][present_T].tolist()
        labels = tensors["labels"][k][present_T].tolist() if "labels" in tensors else None
        n_trained = sum(label != IGNORE_INDEX for label in labels or [])
        name = names[k] if k < len(names) else f"number {k + 1}"
        sequences.append(
            ShownSequence(name, text_spans(tokenizer, ids, labels), len(ids), n_trained)
        )
    columns = ", ".join(
        f"{name}: {_format_scalar(value)}"
        for name, value in row.items()
        if name not in (*PADDED, "ids", "lengths") and _is_scalar(value)
    )
    return Row(int(row["ids"]) + 1, columns, tuple(sequences))


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _format_scalar(value: Tensor) -> str:
    scalar = value.item()
    if isinstance(scalar, bool):
        return "yes" if scalar else "no"
    return f"{scalar:.4g}"


# -- reading a stream

FILL_BATCHES = 50  # batches that the fill rate is measured on


@dataclass(frozen=True)
class Scan:
    """Statistics of the rows read from a stream, and the first rows themselves.

    Attributes:
        rows_in_pass: Rows of a whole pass.
        numbers_N: Numbers of the rows read, from 1, sorted.
        lengths_S: Tokens of every sequence.
        trained_S: Labelled tokens of every sequence.
        prompts: Prompt ids of every row read, in the order of ``numbers_N``.
        n_untrained: Rows without any label.
        first: The first rows of the pass, as batches of one row.
        fill: Share of computed tokens that are not padding, in batches as they come.
        packed_fill: The same with packing; None if the network does not pack.
    """

    rows_in_pass: int
    numbers_N: np.ndarray
    lengths_S: np.ndarray
    trained_S: np.ndarray
    prompts: list[np.ndarray]
    n_untrained: int
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
        n_first: Number of rows to keep.
        limit: Number of rows to read, rounded up to whole batches.
        micro_batch_size: Rows of a micro-batch; None: a whole batch.
        hidden_size: Width of the network if it packs rows; None: no packing.
    """
    numbers: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    prompts: list[np.ndarray] = []
    first: list[Batch] = []
    n_untrained = 0
    padded = Fill()
    packed = Fill(hidden_size)
    n_batches = max(1, -(-limit // source.batch_size))
    for k in range(min(source.batches_per_pass, n_batches)):
        rows = source.batch(k)
        present_BKT = _with_sequences(rows["attention_mask"]).bool()
        labelled_BKT = _with_sequences(rows["labels"]) != IGNORE_INDEX
        lengths_BK = present_BKT.sum(-1).numpy()
        lengths.append(lengths_BK.ravel())
        trained.append(labelled_BKT.sum(-1).numpy().ravel())
        n_untrained += int((~labelled_BKT.any(-1).any(-1)).sum())
        numbers.append(rows["ids"].numpy() + 1)
        prompts += list(extract_prompts(rows))
        first += [_single_row(rows, i) for i in range(min(n_first - len(first), len(lengths_BK)))]
        if k < FILL_BATCHES:
            padded.add(lengths_BK, micro_batch_size)
            packed.add(lengths_BK, micro_batch_size)
    numbers_N = np.concatenate(numbers)
    order = np.argsort(numbers_N, kind="stable")
    return Scan(
        rows_in_pass=source.batches_per_pass * source.batch_size,
        numbers_N=numbers_N[order],
        lengths_S=np.concatenate(lengths),
        trained_S=np.concatenate(trained),
        prompts=[prompts[i] for i in order],
        n_untrained=n_untrained,
        first=first,
        fill=padded.rate,
        packed_fill=None if hidden_size is None else packed.rate,
    )


def extract_prompts(rows: Batch) -> Iterator[np.ndarray]:
    """Token ids of each row's first sequence before its first label; all if it has no label."""
    ids_BT = _with_sequences(rows["input_ids"])[:, 0]
    prompt_BT = _with_sequences(rows["attention_mask"])[:, 0].bool()
    if "labels" in rows:
        labelled_BT = _with_sequences(rows["labels"])[:, 0] != IGNORE_INDEX
        prompt_BT = prompt_BT & (labelled_BT.cumsum(-1) == 0)
    for ids_T, prompt_T in zip(ids_BT, prompt_BT, strict=True):
        yield ids_T[prompt_T].numpy().astype(np.int32)


def _with_sequences(tensor: Tensor) -> Tensor:
    """``B x K x T``, also for rows of one sequence (``B x T``)."""
    return tensor.unsqueeze(1) if tensor.ndim == 2 else tensor


def _single_row(rows: Batch, index: int) -> Batch:
    return {name: torch.as_tensor(value[index]) for name, value in rows.items()}


# -- repeats and overlaps of prompts


def decode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    sets: dict[str, list[np.ndarray]],
    template: ChatTemplate | None = None,
) -> dict[str, list[str]]:
    """Decode sets of prompts, without the text that the template adds to all of them.

    A system prompt, for example, would count as an overlap.

    Args:
        tokenizer: Decodes the tokens.
        sets: Token ids of prompts by the name of their set.
        template: Template that rendered the prompts; None: what all prompts begin and end with is
            left out.
    """
    all_ids = [ids for prompts in sets.values() for ids in prompts]
    # With a template, include two prompts that share nothing but its text: words that all
    # questions share are then kept.
    rendered = []
    if template is not None:
        for word in ("a", "b"):
            rendered.append(np.array(template.prompt_ids((Message("user", word),))))
    compared = [*rendered, *all_ids]
    start = _common_prefix_length(compared)
    end = _common_prefix_length([ids[::-1] for ids in compared])
    if any(len(ids) <= start + end for ids in all_ids):
        # All prompts are equal, or one is contained in the others: leave out nothing.
        start = 0
        end = 0

    def decode(ids: np.ndarray) -> str:
        return str(tokenizer.decode(ids[start : len(ids) - end].tolist(), skip_special_tokens=True))

    return {name: [decode(ids) for ids in prompts] for name, prompts in sets.items()}


def _common_prefix_length(rows: list[np.ndarray]) -> int:
    common = rows[0]
    for ids in rows:
        width = min(len(common), len(ids))
        different = np.flatnonzero(common[:width] != ids[:width])
        common = common[: different[0] if len(different) else width]
    return len(common)


def find_repeats(texts: list[str], numbers_N: np.ndarray) -> Duplicates:
    """Repeated prompts of a set; its examples name rows by their numbers."""
    found = duplicates(texts)
    return replace(found, cases=_to_row_numbers(found.cases, numbers_N, numbers_N))


def find_overlaps(
    texts: dict[str, list[str]], numbers: dict[str, np.ndarray], shared_words: bool
) -> Iterator[tuple[str, str]]:
    """Overlaps of each set of prompts with each set before it, as (names, description).

    Args:
        texts: Prompts by set.
        numbers: Row numbers by set.
        shared_words: Whether to report prompts that share many words in a row, too.
    """
    names = list(texts)
    for j, b in enumerate(names):
        for a in names[:j]:
            found = overlap(texts[a], texts[b])
            found = replace(
                found,
                exact_cases=_to_row_numbers(found.exact_cases, numbers[b], numbers[a]),
                shared_cases=_to_row_numbers(found.shared_cases, numbers[b], numbers[a]),
            )
            yield f"{b} (B) against {a} (A)", str(found) if shared_words else found.in_words


def _to_row_numbers(
    cases: tuple[Pair, ...], first_N: np.ndarray, second_N: np.ndarray
) -> tuple[Pair, ...]:
    """Pairs of positions (from 1) among the rows read, as pairs of row numbers."""
    return tuple((int(first_N[one - 1]), int(second_N[other - 1])) for one, other in cases)
