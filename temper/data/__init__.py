"""Rows of tokens, and streams whose batches are the same for any number of ranks."""

from temper.data.pool import Pool, RowsPool
from temper.data.rows import (
    Batch,
    fingerprint,
    make_rows,
    micro_batches,
    pad_left,
    pair_rows,
    select,
    sequence,
    trim,
)
from temper.data.streams import BatchSource, EvalSet, PoolSource, Stream, StreamLoader

__all__ = [
    "Batch",
    "BatchSource",
    "EvalSet",
    "Pool",
    "PoolSource",
    "RowsPool",
    "Stream",
    "StreamLoader",
    "fingerprint",
    "make_rows",
    "micro_batches",
    "pad_left",
    "pair_rows",
    "select",
    "sequence",
    "trim",
]
