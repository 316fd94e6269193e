"""Preference pairs on the synthetic language: refuse unsafe prompts, answer safe ones."""

from typing import Any

import torch

from datamodules.synthetic import SyntheticDataModule, alignment_counts
from temper.data import PoolSource
from temper.data.rows import stack_rows
from temper.errors import TemperError


class SyntheticPreference(SyntheticDataModule):
    """Stream ``pairs``: rows of two answers, the preferred one first, with the flag ``unsafe``.

    Unsafe prompts: [refusal, answer]; safe ones: [answer, refusal]. The prompts are those that
    `SyntheticAlignment` draws with the same seed, number of rows and ``safe_share``, so that
    preference optimisation and supervised fine-tuning can be compared on the same prompts.

    Args:
        n_pairs: Pairs.
        safe_share: Share of them on safe prompts.
        batch_size: Pairs per optimizer step, over all ranks.
        kwargs: See `SyntheticDataModule`.
    """

    def __init__(
        self,
        n_pairs: int = 8000,
        safe_share: float = 0.5,
        batch_size: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if n_pairs < 1:
            raise TemperError(
                f"data.init_args.n_pairs={n_pairs}: the set is empty; give at least 1"
            )
        self.n_unsafe, self.n_safe = alignment_counts(n_pairs, safe_share)
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Draw all rows; none is an evaluation prompt."""
        self.setup_evaluation()
        self.setup_probe()
        unsafe, safe = self.alignment_prompts(self.n_unsafe, self.n_safe)
        pieces = [
            self.pairs(prompts, comply)
            for prompts, comply in ((unsafe, False), (safe, True))
            if len(prompts)
        ]
        pairs = stack_rows(pieces) | {
            "unsafe": torch.arange(self.n_unsafe + self.n_safe) < self.n_unsafe
        }
        self.sources = {"pairs": PoolSource(pairs, self.batch_size, self.seed, "pairs")}
