"""Preference pairs on the synthetic language: refuse unsafe prompts, answer safe ones."""

from typing import Any

import torch

from datamodules.synthetic import SyntheticDataModule, SyntheticStream, alignment_counts
from temper.data.rows import stack_rows
from temper.errors import TemperError


class SyntheticPreference(SyntheticDataModule):
    """Stream ``pairs``: rows of two answers, the preferred one first, with the flag ``unsafe``.

    Unsafe prompts: [refusal, answer]; safe ones: [answer, refusal]. The prompts are those that
    `SyntheticAlignment` draws with the same seed, number of rows and ``safe_share``, so that
    preference optimisation and supervised fine-tuning can be compared on the same prompts.

    Args:
        n_pairs: Pairs of the stream.
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

    def streams(self) -> dict[str, SyntheticStream]:
        """Draw the one stream: pairs on unsafe prompts, then on safe ones."""
        unsafe, safe = self.alignment_prompts(self.n_unsafe, self.n_safe)
        parts = [(unsafe, False), (safe, True)]
        pairs = stack_rows([self.pairs(prompts, comply) for prompts, comply in parts if prompts])
        is_unsafe = torch.arange(self.n_unsafe + self.n_safe) < self.n_unsafe
        return {"pairs": SyntheticStream(pairs | {"unsafe": is_unsafe}, parts, self.batch_size)}
