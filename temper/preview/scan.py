"""One pass over a stream: lengths, prompts and the first rows, in as many numbers as fit."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from temper.data import Batch, BatchSource
from temper.data.packing import Fill
from temper.losses import IGNORE_INDEX

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


def scan_source(source: BatchSource, n_first: int, limit: int, micro_batch_size: int | None = None, hidden_size: int | None = None) -> Scan:
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
        present_BKT, labelled_BKT = _sequences(rows["attention_mask"]).bool(), _sequences(rows["labels"]) != IGNORE_INDEX
        lengths_BK = present_BKT.sum(-1).numpy()
        lengths.append(lengths_BK.ravel())
        trained.append(labelled_BKT.sum(-1).numpy().ravel())
        untrained += int((~labelled_BKT.any(-1).any(-1)).sum())
        numbers.append(rows["ids"].numpy() + 1)
        prompts += list(prompt_ids(rows))
        first += [_row(rows, i) for i in range(min(n_first - len(first), len(lengths_BK)))]
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
    """Tokens of every row before the first label of its first sequence; all of them, if it has none."""
    ids_BT, present_BT = _sequences(rows["input_ids"])[:, 0], _sequences(rows["attention_mask"])[:, 0].bool()
    if "labels" in rows:
        present_BT = present_BT & ((_sequences(rows["labels"])[:, 0] != IGNORE_INDEX).cumsum(-1) == 0)
    for ids_T, present_T in zip(ids_BT, present_BT, strict=True):
        yield ids_T[present_T].numpy().astype(np.int32)


def _sequences(tensor: Tensor) -> Tensor:
    """``B x T`` as ``B x 1 x T``."""
    return tensor.unsqueeze(1) if tensor.ndim == 2 else tensor


def _row(rows: Batch, index: int) -> Batch:
    return {name: torch.as_tensor(value[index]) for name, value in rows.items()}
