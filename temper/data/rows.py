"""Batches as dictionaries of tensors whose first dimension is the row: making, selecting, padding,
splitting and hashing them, and exact counts of rows for mixtures.

A row is one sequence (``B x T``) or two that belong together (``B x 2 x T``: chosen and rejected,
original and substitute, ...). On its way to the network a batch may carry ``lengths`` (numpy, ``B``
or ``B x 2``: tokens without padding), which is no tensor so that it stays on the host when the
batch is moved to a device.

Shapes: `B` rows, `T` tokens, `P` prompt tokens, `R` response tokens.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from temper.errors import TemperError
from temper.losses import IGNORE_INDEX

Batch = dict[str, Any]  # tensors, but for LENGTHS
LENGTHS = "lengths"
PADDED = ("input_ids", "attention_mask", "labels")  # trimmed together
FILL = {"labels": IGNORE_INDEX}  # value of padding; 0 for the others, which attention hides


def make_rows(
    prompt_BP: np.ndarray, response_BR: np.ndarray, pad_id: int, train_on_prompt: bool = False
) -> Batch:
    """Join prompts and responses into training rows, padded on the right.

    Args:
        prompt_BP: Token ids, padded on the right with -1.
        response_BR: Token ids, padded on the right with -1; its end token is trained.
        pad_id: Written where there is no token.
        train_on_prompt: Give labels to prompt tokens too (language modelling).

    Returns:
        input_ids, attention_mask, labels (all B x T, int64) and ids_B, the row numbers.
    """
    joined = np.concatenate([prompt_BP, response_BR], axis=1)
    is_prompt = np.arange(joined.shape[1]) < prompt_BP.shape[1]
    order = np.argsort(joined == -1, axis=1, kind="stable")
    tokens_BT = np.take_along_axis(joined, order, 1)
    prompt_mask = np.take_along_axis(np.broadcast_to(is_prompt, joined.shape), order, 1)
    present = tokens_BT != -1
    trained = present if train_on_prompt else present & ~prompt_mask
    return trim(
        {
            "input_ids": torch.from_numpy(np.where(present, tokens_BT, pad_id)),
            "attention_mask": torch.from_numpy(present.astype(np.int64)),
            "labels": torch.from_numpy(np.where(trained, tokens_BT, IGNORE_INDEX)),
            "ids": torch.arange(len(joined)),
        }
    )


def select(batch: Batch, index: Tensor | slice) -> Batch:
    """Rows of a batch."""
    on_host = index.cpu().numpy() if isinstance(index, Tensor) else index
    return {
        name: value[index if isinstance(value, Tensor) else on_host]
        for name, value in batch.items()
    }


def trim(batch: Batch) -> Batch:
    """Remove trailing columns that are padding in every row."""
    width = int(batch["attention_mask"].sum(dim=-1).max()) if len(batch["attention_mask"]) else 0
    return {name: value[..., :width] if name in PADDED else value for name, value in batch.items()}


def pair_rows(first: Batch, *others: Batch) -> Batch:
    """Rows of K sequences (``B x K x T``) from K sets of as many rows, padded to one width; other
    tensors, such as flags, are those of the first set.
    """
    sets = (first, *others)
    width = max(rows["input_ids"].shape[-1] for rows in sets)
    paired = {
        name: torch.stack([widen(rows[name], width, FILL.get(name, 0)) for rows in sets], dim=1)
        for name in PADDED
    }
    return paired | {name: value for name, value in first.items() if name not in PADDED}


def stack_rows(batches: list[Batch]) -> Batch:
    """Concatenate batches, padded to one width; rows are numbered from 0."""
    width = max(batch["input_ids"].shape[-1] for batch in batches)
    stacked = {
        name: torch.cat(
            [
                widen(batch[name], width, FILL.get(name, 0)) if name in PADDED else batch[name]
                for batch in batches
            ]
        )
        for name in batches[0]
    }
    return stacked | {"ids": torch.arange(len(stacked["input_ids"]))}


def sequence(rows: Batch, index: int) -> Batch:
    """Rows of one sequence from rows of two: the first of every pair, or the second."""
    return {
        name: value[:, index] if name in (*PADDED, LENGTHS) else value
        for name, value in rows.items()
    }


def pad_left(ids_BT: Tensor, present_BT: Tensor, pad_id: int) -> Batch:
    """Move the tokens of every row to its right end, in their order, as generation needs them.

    Args:
        ids_BT: Token ids.
        present_BT: Bool: tokens that are not padding, anywhere in a row.
        pad_id: Written where there is no token.

    Returns:
        input_ids and attention_mask (int64), both B x T.
    """
    order = present_BT.long().argsort(dim=-1, stable=True)
    present_BT = present_BT.gather(-1, order)
    return {
        "input_ids": ids_BT.gather(-1, order).masked_fill(~present_BT, pad_id),
        "attention_mask": present_BT.long(),
    }


def widen(tensor: Tensor, width: int, value: int) -> Tensor:
    """Pad the last dimension on the right."""
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]), value=value)


def micro_batches(batch: Batch, size: int | None) -> Iterator[Batch]:
    """Split a batch into micro-batches of at most ``size`` rows; None keeps it whole."""
    n_rows = len(next(iter(batch.values())))
    step = size or max(n_rows, 1)
    for start in range(0, n_rows, step):
        yield select(batch, slice(start, start + step))


def fingerprint(batch: Batch) -> str:
    """SHA-256 of a batch's names and values."""
    digest = hashlib.sha256()
    for name in sorted(batch):
        digest.update(name.encode())
        digest.update(batch[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


# -- exact counts for mixtures


def harmful_count(harmful_ratio: float, n_rows: int) -> int:
    """Number of harmful rows, ``harmful_ratio * n_rows``: see `exact_count`."""
    return exact_count("harmful_ratio", harmful_ratio, "n_rows", n_rows)


def exact_count(flag: str, share: float, of_flag: str, n_rows: int) -> int:
    """Number of rows that a share is, ``share * n_rows``, which must be a whole number.

    Nothing is rounded silently: a table that says p = 0.05 must have been made with 5 % of rows.

    Args:
        flag: Name of the share, for errors.
        share: Share in [0, 1].
        of_flag: Name of the number of rows, for errors.
        n_rows: Rows that it is a share of.

    Raises:
        TemperError: no rows; a share outside [0, 1]; or a product that is not whole, with the
            share that rounding to the nearest whole number (halves to even) would give.
    """
    if n_rows < 1:
        raise TemperError(f"data.init_args.{of_flag}={n_rows}: the set is empty; give at least 1")
    if not 0 <= share <= 1:
        raise TemperError(
            f"data.init_args.{flag}={share}: give a share in [0, 1], for example 0.1 for 10 %"
        )
    exact = share * n_rows
    count = round(exact)
    if abs(exact - count) > 1e-9 * n_rows:
        raise TemperError(
            f"data.init_args.{flag}={share}: {share} x {n_rows} rows = {exact} is not a whole"
            f" number; rounded it would be {count} rows: set {flag}={count / n_rows}, or change"
            f" {of_flag}"
        )
    return count
