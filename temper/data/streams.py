"""Endless seeded streams of batches, and evaluation sets, sharded over ranks.

Batch number k of a stream depends on the seed and k alone. So one process with batches of 8 rows
sees the same rows as two ranks with 4 each, and a run resumes from the number of batches that it
has consumed.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from temper.data.pool import Pool, RowsPool
from temper.data.rows import PADDED, Batch, select, trim
from temper.errors import TemperError


class BatchSource(Protocol):
    """Anything that can make global batch number k."""

    batch_size: int
    batches_per_pass: int

    def fingerprint(self) -> str:
        """SHA-256 that changes when the rows do."""
        ...

    def batch(self, number: int) -> Batch:
        """Global batch ``number``, the same on every rank."""
        ...


class PoolSource:
    """Batches from a fixed pool of rows, in a new seeded order for every pass.

    Rows that do not fill the last batch of a pass are left out of that pass.

    Args:
        pool: The rows: a pool, or a batch of all of them.
        batch_size: Rows per batch.
        seed: Of the orders.
        name: Of the stream, for errors.

    Raises:
        TemperError: the pool is empty or smaller than one batch.
    """

    def __init__(self, pool: Pool | Batch, batch_size: int, seed: int, name: str) -> None:
        self.pool: Pool = RowsPool(pool) if isinstance(pool, dict) else pool
        self.batch_size = batch_size
        self.seed = seed
        self.n_rows = len(self.pool)
        self._order: tuple[int, Tensor] | None = None  # a pass and its permutation
        if not 1 <= batch_size <= self.n_rows:
            raise TemperError(
                f"stream {name!r} has {self.n_rows} rows, and a batch is {batch_size}: give more"
                " rows, or a batch size from 1 to that"
            )
        self.batches_per_pass = self.n_rows // batch_size

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_order": None}  # a loader process makes its own

    @property
    def rows(self) -> Batch:
        """All rows at once, in memory."""
        return self.pool[:]

    def fingerprint(self) -> str:
        """SHA-256 of the pool."""
        return self.pool.fingerprint()

    def batch(self, number: int) -> Batch:
        """Global batch ``number``: a slice of the pass's permutation."""
        this_pass, position = divmod(number, self.batches_per_pass)
        order = self._permutation(this_pass)
        return self.pool[order[position * self.batch_size : (position + 1) * self.batch_size]]

    def _permutation(self, this_pass: int) -> Tensor:
        """Order of the rows in a pass, int64; that of the latest pass is kept: 8 bytes a row."""
        if self._order is None or self._order[0] != this_pass:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + this_pass)
            self._order = (this_pass, torch.randperm(self.n_rows, generator=generator))
        return self._order[1]


class Stream(IterableDataset[Batch]):
    """This rank's share of a source's batches, ``epoch_batches`` at a time.

    Args:
        source: Where global batches come from.
        epoch_batches: Batches per epoch. Every stream of a step has the same number, that of the
            primary stream; a stream with fewer rows goes round, one with more continues next epoch.
        start: Next batch to hand out, counted over the whole run; iteration ends with its epoch.
        rank: This process.
        world_size: Number of processes; must divide the global batch size.
    """

    def __init__(
        self, source: BatchSource, epoch_batches: int, start: int, rank: int, world_size: int
    ) -> None:
        self.source = source
        self.epoch_batches = epoch_batches
        self.next_batch = start
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.epoch_batches

    def __iter__(self) -> Iterator[Batch]:
        first = self.next_batch
        end = (first // self.epoch_batches + 1) * self.epoch_batches
        worker = get_worker_info()
        offset = worker.id if worker else 0
        stride = worker.num_workers if worker else 1
        for number in range(first + offset, end, stride):
            rows = self.source.batch(number)
            share = len(rows["input_ids"]) // self.world_size
            yield trim(select(rows, slice(self.rank * share, (self.rank + 1) * share)))


class StreamLoader(DataLoader[Batch]):
    """Loader of a `Stream` that asks, whenever an epoch begins, where the run stands.

    The run's own count of finished batches decides, not the count of batches handed out here: some
    may have been fetched ahead, and an epoch resumed at its end is begun without taking any.

    Args:
        stream: The stream.
        position: Number of batches the run has finished.
        num_workers: Loader processes; order and content of batches do not depend on it.
    """

    def __init__(self, stream: Stream, position: Callable[[], int], num_workers: int = 0) -> None:
        super().__init__(
            stream, batch_size=None, num_workers=num_workers, generator=own_generator()
        )
        self.position = position

    def __iter__(self):  # type: ignore[no-untyped-def]
        self.dataset.next_batch = self.position()  # type: ignore[attr-defined]
        return super().__iter__()


def own_generator() -> torch.Generator:
    """For a loader: one that is given none takes a number from the global generator whenever an
    epoch begins, and a run that is resumed begins one more.
    """
    return torch.Generator().manual_seed(0)


class EvalSet(IterableDataset[Batch]):
    """Every row once over all ranks, in equally many batches on each.

    No row is repeated to fill a batch, so metrics need no correction; and ranks that communicate in
    a forward pass (buffers under DDP, shards under FSDP) stay in step. Rows of about one length
    share a batch, the longest first (so running out of memory shows at once), and a batch is
    as wide as its longest row, whichever side the padding is on: little of it is computed.

    Raises:
        TemperError: fewer rows than ranks.
    """

    def __init__(self, rows: Batch, batch_size: int, rank: int, world_size: int) -> None:
        n_rows = len(rows["input_ids"])
        if n_rows < world_size:
            raise TemperError(
                f"{n_rows} evaluation prompts for {world_size} ranks: give at least one each"
                " (data.init_args.n_eval)"
            )
        lengths_n = rows["attention_mask"].sum(-1).reshape(n_rows, -1).amax(-1)
        self.rows = rows
        self.numbers = lengths_n.argsort(descending=True, stable=True)[rank::world_size]
        largest_share = -(-n_rows // world_size)
        self.n_batches = min(-(-largest_share // batch_size), n_rows // world_size)

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Batch]:
        for numbers in self.numbers.tensor_split(self.n_batches):
            yield _crop(select(self.rows, numbers))


def _crop(batch: Batch) -> Batch:
    """Cut the columns at either end that are padding in every row."""
    mask = batch["attention_mask"]
    used = mask.reshape(-1, mask.shape[-1]).any(0).nonzero().flatten().tolist()
    columns = slice(used[0], used[-1] + 1) if used else slice(0)
    return {name: value[..., columns] if name in PADDED else value for name, value in batch.items()}
