"""Counted work of a training run: cost in units that need no clock."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from temper.data import Batch
from temper.losses import IGNORE_INDEX


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.long)


@dataclass
class Work:
    """Cost of training so far on this rank, in units that need no clock.

    Attributes:
        passes: Forward-backward passes over a batch.
        tokens: Tokens read in them, of prompts and answers, without padding (int64 scalar on the
            device: no synchronisation).
        trained_tokens: Those among them that have a label and a token before them that predicts it.
        forwards: Forward passes without a backward one: reference models, importance, statistics.
        forward_tokens: Tokens in those.
        is_first_micro_batch: Whether the current micro-batch is the first of its batch; see
            `one_batch`.
    """

    passes: int = 0
    tokens: Tensor = field(default_factory=_zero)
    trained_tokens: Tensor = field(default_factory=_zero)
    forwards: int = 0
    forward_tokens: Tensor = field(default_factory=_zero)
    is_first_micro_batch: bool = True

    def count_pass(self, rows: Batch) -> None:
        """Count a forward-backward pass over rows."""
        self.passes += 1
        self.tokens = self.tokens + rows["attention_mask"].sum()
        labelled = (rows["labels"][..., 1:] != IGNORE_INDEX).sum()
        self.trained_tokens = self.trained_tokens + labelled

    def count_forward(self, rows: Batch) -> None:
        """Count a forward pass over a micro-batch, once per batch."""
        self.forwards += self.is_first_micro_batch
        self.forward_tokens = self.forward_tokens + rows["attention_mask"].sum()

    @contextmanager
    def one_batch(self) -> Iterator[None]:
        """While it lasts, forward passes over all micro-batches of a batch count as one pass."""
        try:
            yield
        finally:
            self.is_first_micro_batch = True

    def end_micro_batch(self) -> None:
        """Forward passes from here on are over a later micro-batch of the batch."""
        self.is_first_micro_batch = False

    def state_dict(self) -> dict[str, Any]:
        """Counts for a checkpoint; tensors on the CPU."""
        return {
            "passes": self.passes,
            "tokens": self.tokens.cpu(),
            "trained_tokens": self.trained_tokens.cpu(),
            "forwards": self.forwards,
            "forward_tokens": self.forward_tokens.cpu(),
        }

    @classmethod
    def from_ranks(cls, states: Sequence[dict[str, Any]], rank: int) -> Self:
        """This rank's share of the work of another number of ranks.

        Tokens are summed over ranks in the end, so rank 0 carries those of all earlier ranks.
        """
        first = states[0]

        def summed(name: str) -> Tensor:
            counts = [state.get(name, _zero()) for state in states]
            return torch.stack(counts).sum() if rank == 0 else _zero()

        return cls(
            passes=first["passes"],
            tokens=summed("tokens"),
            trained_tokens=summed("trained_tokens"),
            forwards=first["forwards"],
            forward_tokens=summed("forward_tokens"),
        )
