"""Preference pairs from a file."""

from typing import Any, ClassVar

from datamodules.text import TextDataModule
from temper.data import BatchSource, PoolSource
from temper.data.pool import JoinedPool, Pool, Subset
from temper.data.token_pool import TokenPool


class TextPreference(TextDataModule):
    """Stream ``pairs``: rows of two answers to a prompt, the preferred one first.

    Args:
        pairs: File of preference pairs.
        safe_pairs: File of further pairs, on safe prompts for example; null: none.
        batch_size: Pairs per optimizer step, over all ranks.
        kwargs: See `TextDataModule`.
    """

    one_answer: ClassVar = True

    def __init__(
        self, pairs: str, safe_pairs: str | None = None, batch_size: int = 16, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.batch_size = batch_size
        self.files["pairs"] = self.text_file("pairs", pairs, "preference")
        if safe_pairs is not None:
            self.files["safe_pairs"] = self.text_file("safe_pairs", safe_pairs, "preference")

    def streams(self, pools: dict[str, TokenPool]) -> dict[str, BatchSource]:
        """The one stream."""
        pool: Pool = pools["pairs"]
        if "safe_pairs" in pools:
            pool = JoinedPool(Subset(pool), Subset(pools["safe_pairs"]))
        return {"pairs": PoolSource(pool, self.batch_size, self.seed, "pairs")}
