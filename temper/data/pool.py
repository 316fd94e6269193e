"""Fixed sets of rows behind one interface: in memory, in files (`temper.data.token_pool`), or views
that make their rows from those of other pools.

Shapes: `B` requested rows, `n` rows in a pool, `K` sequences in a row, `T` tokens, `P` prompt
tokens, `R` answer tokens.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from temper.data.rows import PADDED, Batch, fingerprint, make_rows, pair_rows, select, stack_rows
from temper.losses import IGNORE_INDEX

Index = Tensor | slice
CHUNK = 1024  # rows that are read together where a whole pool is gone through


class Pool(Protocol):
    """Rows with the numbers 0 to n - 1."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row without padding: int32, ``n`` or ``n x K``."""
        ...

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, index: Index) -> Batch:
        """Rows padded on the right to one width, with their numbers in ``ids``."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 that changes when the rows do."""
        ...


class RowsPool:
    """Rows in memory.

    Args:
        rows: All of them, padded to one width, as every batch will be.
    """

    def __init__(self, rows: Batch) -> None:
        self.rows = rows

    @property
    def lengths(self) -> np.ndarray:
        """See `Pool`."""
        return np.asarray(self.rows["attention_mask"].sum(dim=-1), dtype=np.int32)

    def __len__(self) -> int:
        return len(self.rows["input_ids"])

    def __getitem__(self, index: Index) -> Batch:
        return select(self.rows, index)

    def fingerprint(self) -> str:
        """See `Pool`."""
        return fingerprint(self.rows)


def row_numbers(n_rows: int, index: Index) -> np.ndarray:
    """Row numbers of an index: int64, ``B``. The cost depends on B and not on the pool's size.

    Args:
        n_rows: Rows of the pool.
        index: A slice, numbers (negative ones count from the end), or a mask over all rows.

    Raises:
        IndexError: a number or the mask does not fit the pool.
    """
    if isinstance(index, slice):
        return np.arange(*index.indices(n_rows))
    wanted = np.asarray(index).reshape(-1)
    if wanted.dtype == bool:
        if len(wanted) != n_rows:
            raise IndexError(f"a mask of {len(wanted)} rows for a pool of {n_rows}")
        return np.flatnonzero(wanted)
    numbers_B: np.ndarray = np.where(wanted < 0, wanted + n_rows, wanted).astype(np.int64)
    if ((numbers_B < 0) | (numbers_B >= n_rows)).any():
        raise IndexError(f"a row number is out of range for a pool of {n_rows} rows")
    return numbers_B


# -- views: rows are made from those of other pools when they are read


@dataclass(frozen=True)
class Subset:
    """Some or all rows of a pool, with flags.

    Args:
        pool: The pool.
        rows: Their numbers there; None: all rows.
        flags: Flags of all these rows, by name: a column of the joined pool.
    """

    pool: Pool
    rows: np.ndarray | None = None
    flags: Mapping[str, bool] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pool) if self.rows is None else len(self.rows)

    @property
    def numbers(self) -> np.ndarray:
        """Numbers of all the rows in the pool."""
        return np.arange(len(self.pool)) if self.rows is None else self.rows

    def in_pool(self, places: np.ndarray) -> np.ndarray:
        """Numbers in the pool of the rows at these places, without a list of all of them."""
        return places if self.rows is None else self.rows[places]


class JoinedPool:
    """Rows of several pools, numbered through.

    Args:
        subsets: The rows of each pool; with the same flags, and as many sequences in a row.
    """

    def __init__(self, *subsets: Subset) -> None:
        self.subsets = [subset for subset in subsets if len(subset)]
        self._starts = np.cumsum([0] + [len(subset) for subset in self.subsets])

    @property
    def lengths(self) -> np.ndarray:
        """See `Pool`."""
        return np.concatenate([subset.pool.lengths[subset.numbers] for subset in self.subsets])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Index) -> Batch:
        numbers_B = row_numbers(len(self), index)
        subset_B = np.searchsorted(self._starts, numbers_B, side="right") - 1
        places: list[np.ndarray] = []  # in the batch, of the rows of each subset
        batches: list[Batch] = []
        for i in np.unique(subset_B):
            subset = self.subsets[i]
            places.append(np.flatnonzero(subset_B == i))
            rows = subset.in_pool(numbers_B[places[-1]] - self._starts[i])
            flags = {name: torch.full((len(rows),), value) for name, value in subset.flags.items()}
            batches.append(subset.pool[torch.from_numpy(rows)] | flags)
        back = torch.from_numpy(np.argsort(np.concatenate(places)))
        return select(stack_rows(batches), back) | {"ids": torch.from_numpy(numbers_B)}

    def fingerprint(self) -> str:
        """See `Pool`."""
        digest = hashlib.sha256()
        for subset in self.subsets:
            digest.update(
                f"{subset.pool.fingerprint()} {sorted(subset.flags.items())}".encode()
                + subset.numbers.tobytes()
            )
        return digest.hexdigest()


class MismatchedPool:
    """Rows of two sequences: one of a pool's rows, and its prompt with the answer of another row.

    The other row is the one before it in a seeded order, so every answer is used twice. (KTO
    estimates a divergence on these.)

    Args:
        pool: Rows of one sequence: a prompt, and at its end a labelled answer.
        seed: Of the order.
        max_length: A mismatched answer is cut where its sequence would become longer.
    """

    def __init__(self, pool: Pool, seed: int, max_length: int) -> None:
        self.pool = pool
        self.seed = seed
        self.max_length = max_length
        order = np.random.default_rng(seed).permutation(len(pool))
        self.other_n = np.empty_like(order)
        self.other_n[order] = np.roll(order, 1)

    @cached_property
    def lengths(self) -> np.ndarray:
        """See `Pool`."""
        chunks: list[np.ndarray] = [
            self[start : start + CHUNK]["attention_mask"].sum(-1).numpy()
            for start in range(0, len(self), CHUNK)
        ]
        return np.concatenate(chunks).astype(np.int32)

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, index: Index) -> Batch:
        numbers_B = row_numbers(len(self), index)
        own = self.pool[torch.from_numpy(numbers_B)]
        other = self.pool[torch.from_numpy(self.other_n[numbers_B])]
        prompt_BP, _ = _apart(own)
        _, answer_BR = _apart(other)
        mismatched = make_rows(prompt_BP, answer_BR, pad_id=0)
        cut = {name: mismatched[name][:, : self.max_length] for name in PADDED}
        return pair_rows(own, cut)

    def fingerprint(self) -> str:
        """See `Pool`."""
        return hashlib.sha256(
            f"{self.pool.fingerprint()} {self.seed} {self.max_length}".encode()
        ).hexdigest()


class SequencesPool:
    """Some of the sequences of every row, in another order; one alone makes rows of one sequence.

    Args:
        pool: Rows of several sequences.
        which: Their numbers.
    """

    def __init__(self, pool: Pool, *which: int) -> None:
        self.pool = pool
        self.which: int | list[int] = which[0] if len(which) == 1 else list(which)

    @property
    def lengths(self) -> np.ndarray:
        """See `Pool`."""
        return self.pool.lengths[:, self.which]

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, index: Index) -> Batch:
        return {
            name: value[:, self.which] if name in PADDED else value
            for name, value in self.pool[index].items()
        }

    def fingerprint(self) -> str:
        """See `Pool`."""
        return hashlib.sha256(f"{self.pool.fingerprint()} {self.which}".encode()).hexdigest()


def _apart(rows: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Prompts, and the answers that end the rows: ids, with -1 at all other places."""
    ids = rows["input_ids"].numpy()
    present = rows["attention_mask"].numpy() != 0
    place = np.arange(ids.shape[1])
    begins_B = ((present & (rows["labels"].numpy() == IGNORE_INDEX)) * (place + 1)).max(
        axis=1, keepdims=True
    )
    return np.where(place < begins_B, ids, -1), np.where(present & (place >= begins_B), ids, -1)
