"""From data that have been set up to what is shown of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from temper.data import Batch, BatchSource
from temper.data.overlap import Duplicates
from temper.data.rows import PADDED
from temper.losses import IGNORE_INDEX
from temper.preview.parts import Preview, Row, Shown, Stream, histogram
from temper.preview.pieces import pieces
from temper.preview.prompts import compare, prompt_texts, repeated
from temper.preview.scan import Scan, prompt_ids, scan_source

# Words in a row say nothing where there are hardly any different words, as in the synthetic language.
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
    """What is read of a datamodule; ``format.name`` and ``reports`` are read where there are any."""

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
    scans = {name: scan_source(data.sources[name], rows, limit, micro_batch_size, hidden_size) for name in streams}
    prompts = {name: scan.prompts for name, scan in scans.items()} | {"evaluation": list(prompt_ids(data.eval_rows))}
    texts = prompt_texts(data.tokenizer, prompts, getattr(data, "format", None))
    numbers = {name: scan.numbers_N for name, scan in scans.items()} | {"evaluation": data.eval_rows["ids"].numpy() + 1}
    seen = [_stream(data, name, scan, repeated(texts[name], numbers[name])) for name, scan in scans.items()]
    if texts["evaluation"]:
        seen.append(_evaluation(data, rows, repeated(texts["evaluation"], numbers["evaluation"])))
    return Preview(
        title=title,
        facts=_facts(data),
        streams=tuple(seen),
        overlaps=tuple(
            compare({name: found for name, found in texts.items() if found}, numbers, in_a_row=len(data.tokenizer) >= SMALL_VOCABULARY)
        ),
        reports=tuple((name, str(report)) for name, report in getattr(data, "reports", {}).items()),
    )


def _facts(data: Data) -> tuple[str, ...]:
    tokenizer = data.tokenizer
    template = getattr(getattr(data, "format", None), "name", None)
    ends = f"end of text {tokenizer.eos_token!r}, padding {tokenizer.pad_token!r}"
    named = f"template: {WHOSE.get(template, template)}" if template else "template: none (the data write tokens themselves)"
    numbers = "rows are numbered from 1, as they are held: rows left out when they were read have no number"
    return (named, f"tokenizer: {type(tokenizer).__name__}, {len(tokenizer):,} tokens, {ends}", numbers)


def _stream(data: Data, name: str, scan: Scan, repeats: Duplicates) -> Stream:
    source, read = data.sources[name], len(scan.numbers_N)
    cut = "" if read == scan.rows_in_pass else f" ({read:,} of them read for the figures below)"
    facts = [
        f"{scan.rows_in_pass:,} rows in a pass: {source.batches_per_pass:,} x {source.batch_size}{cut}",
        f"computed tokens that are no padding: {scan.fill:.0%}" + ("" if scan.packed_fill is None else f", packed {scan.packed_fill:.0%}"),
        f"prompts: {repeats}",
    ]
    if scan.untrained:
        facts.append(f"{scan.untrained:,} rows have no trained token: they are computed and teach nothing")
    bars = histogram("Tokens of a sequence", scan.lengths_S), histogram("Trained tokens of a sequence", scan.trained_S)
    return Stream(name, tuple(facts), tuple(_row(data.tokenizer, name, row) for row in scan.first), bars)


def _evaluation(data: Data, rows: int, repeats: Duplicates) -> Stream:
    kinds_B, lengths_B = data.eval_rows["kind"], data.eval_rows["attention_mask"].sum(-1)
    counts = ", ".join(f"{int((kinds_B == i).sum()):,} {kind}" for i, kind in enumerate(data.eval_kinds))
    shown = [i for kind in range(len(data.eval_kinds)) for i in (kinds_B == kind).nonzero()[:rows, 0].tolist()]
    seen = []
    for i in shown:
        row = {name: value[i] for name, value in data.eval_rows.items() if name != "kind"}
        seen.append(replace(_row(data.tokenizer, "evaluation", row), marks=data.eval_kinds[int(kinds_B[i])]))
    bars = (histogram("Tokens of a prompt", lengths_B.numpy()),)
    return Stream("evaluation", (f"{len(kinds_B):,} prompts: {counts}", f"prompts: {repeats}"), tuple(seen), bars)


def _row(tokenizer: PreTrainedTokenizerBase, stream: str, row: Batch) -> Row:
    parts = {name: row[name] if row[name].ndim == 2 else row[name].unsqueeze(0) for name in PADDED if name in row}
    names = NAMES.get(stream, ("first", "second")) if len(parts["input_ids"]) > 1 else ("",)
    sequences = []
    for k, present_T in enumerate(parts["attention_mask"].bool()):
        ids = parts["input_ids"][k][present_T].tolist()
        labels = parts["labels"][k][present_T].tolist() if "labels" in parts else None
        trained = sum(label != IGNORE_INDEX for label in labels or [])
        name = names[k] if k < len(names) else f"number {k + 1}"
        sequences.append(Shown(name, pieces(tokenizer, ids, labels), len(ids), trained))
    marks = ", ".join(
        f"{name}: {_mark(value)}" for name, value in row.items() if name not in (*PADDED, "ids", "lengths") and _is_mark(value)
    )
    return Row(int(row["ids"]) + 1, marks, tuple(sequences))


def _is_mark(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _mark(value: Tensor) -> str:
    found = value.item()
    return {True: "yes", False: "no"}[found] if isinstance(found, bool) else f"{found:.4g}"
