"""Packing: several sequences in one row of tokens, so that nothing is computed for padding.

A plan maps every token of padded rows to its place in packed rows. Outputs are mapped back, so
losses see padded rows as without packing. Sequences stay whole, and never attend to each other
(`temper.models.score`).

Shapes: `R` sequences, `T` their padded length, `P` packed rows, `C` their capacity.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WORTH_IT = 0.9  # pack only if that costs at most this share of the padded rows
STRETCHES = (1, 2, 3, 4)  # capacities that are tried, in lengths of the longest sequence


@dataclass(frozen=True)
class Packing:
    """Places of tokens in packed rows.

    Args:
        source_PC: Index into the flattened padded rows (``R * T``); padding repeats index 0.
        positions_PC: Position inside the sequence; 0 for padding, so that each pad is a sequence of
            its own.
        begins_PC: Bool: first token of a sequence, or padding; nothing before it predicts it.
        slots_RT: Index into the flattened packed rows (``P * C``); that of the sequence's first
            token where a row is padding.
    """

    source_PC: Tensor
    positions_PC: Tensor
    begins_PC: Tensor
    slots_RT: Tensor

    def to(self, device: torch.device) -> "Packing":
        """Copy to a device, asynchronously."""
        return Packing(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))


def plan_packing(
    lengths: np.ndarray, width: int, hidden_size: int, in_one_row: bool = False
) -> Packing | None:
    """Plan packed rows: first fit, longest first, with the capacity that costs least; see `cost`.

    Args:
        lengths: Tokens of each sequence, R whole numbers from 1 to ``width``.
        width: Padded length T of the rows that the plan is for.
        hidden_size: Width of the network, which weighs attention against the rest.
        in_one_row: Put all sequences into a single row, for kernels that compute no attention
            between sequences.

    Returns:
        The plan; None where packing would cost more than `WORTH_IT` of the padded rows.
    """
    padded = packing_cost(len(lengths), width, hidden_size)
    if in_one_row:
        bins = [list(range(len(lengths)))]
        capacity = int(lengths.sum())
        price = packing_cost(1, capacity, hidden_size, attended=width)
    else:
        tried = [
            (first_fit(lengths, stretch * int(lengths.max())), stretch * int(lengths.max()))
            for stretch in STRETCHES
        ]
        tried = [(bins, max(int(lengths[members].sum()) for members in bins)) for bins, _ in tried]
        price, bins, capacity = min(
            (packing_cost(len(bins), capacity, hidden_size), bins, capacity)
            for bins, capacity in tried
        )
    return None if price > WORTH_IT * padded else _lay_out(bins, capacity, lengths, width)


def packing_cost(n_rows: int, width: int, hidden_size: int, attended: int | None = None) -> float:
    """Relative cost of rows of tokens: ``24 D^2`` operations per token and layer in the linear
    maps, ``4 C D`` in attention.

    Args:
        n_rows: Rows.
        width: Tokens in each.
        hidden_size: Width D of the network.
        attended: Tokens C that each token is compared with; None: the whole row, as with a dense
            mask.
    """
    return n_rows * width * (1 + (attended or width) / (6 * hidden_size))


def _lay_out(bins: list[list[int]], capacity: int, lengths: np.ndarray, width: int) -> Packing:
    source = np.zeros((len(bins), capacity), np.int64)
    positions = np.zeros_like(source)
    begins = np.ones(source.shape, bool)
    slots = np.empty((len(lengths), width), np.int64)
    for p, members in enumerate(bins):
        at = 0
        for row in members:
            n = int(lengths[row])
            source[p, at : at + n] = row * width + np.arange(n)
            positions[p, at : at + n] = np.arange(n)
            begins[p, at + 1 : at + n] = False
            slots[row, :n] = p * capacity + at + np.arange(n)
            slots[row, n:] = p * capacity + at
            at += n
    return Packing(*map(torch.from_numpy, (source, positions, begins, slots)))


def first_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Sequence numbers by row: each sequence, longest first, goes into the first row that has
    room.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for row in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[row])
        place = next((i for i, free in enumerate(room) if free >= n), None)
        if place is None:
            bins.append([])
            room.append(capacity)
            place = len(bins) - 1
        bins[place].append(row)
        room[place] -= n
    return bins


class Fill:
    """Counts of real and computed tokens over many forward passes.

    Args:
        hidden_size: Width of the network; None: rows are padded, not packed.
    """

    def __init__(self, hidden_size: int | None = None) -> None:
        self.hidden_size = hidden_size
        self.real = 0.0
        self.computed = 0.0

    def add(self, lengths: np.ndarray, n_together: int | None = None) -> None:
        """Add a batch of rows.

        Args:
            lengths: Tokens of each row, ``B``, or of each of its sequences, ``B x K``; empty
                sequences are not counted.
            n_together: Rows that go through the network together; None: all.
        """
        for start in range(0, len(lengths), n_together or len(lengths)):
            together = lengths[start : start + (n_together or len(lengths))].ravel()
            together = together[together > 0]
            if len(together):
                self.real += together.sum()
                self.computed += together.sum() / fill_rate(together, self.hidden_size)

    @property
    def rate(self) -> float:
        """Share of computed tokens that are real."""
        return float(self.real / max(self.computed, 1))


def fill_rate(lengths: np.ndarray, hidden_size: int | None = None) -> float:
    """Share of computed tokens that are not padding, for sequences that go through the network
    together.

    Args:
        lengths: Tokens of each sequence.
        hidden_size: Width of the network that they are packed for by `plan_packing` (which leaves
            them padded where packing hardly helps); None: padded to the longest.
    """
    width = int(lengths.max())
    plan = None if hidden_size is None else plan_packing(lengths, width, hidden_size)
    return float(lengths.sum() / (len(lengths) * width if plan is None else plan.source_PC.numel()))
