"""Prompts and answers from a file."""

from typing import Any

from datamodules.text import TextDataModule
from temper.data import BatchSource, PoolSource
from temper.data.token_pool import TokenPool


class TextSupervised(TextDataModule):
    """One stream of supervised rows, for `SFTModule` and other objectives of one stream.

    Args:
        train: File of prompts with answers.
        stream: Name of the stream; an objective that reads one by name, such as `VaccineModule`,
            needs ``alignment``.
        batch_size: Rows per optimizer step, over all ranks.
        kwargs: See `TextDataModule`.
    """

    def __init__(
        self, train: str, stream: str = "train", batch_size: int = 16, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.stream = stream
        self.batch_size = batch_size
        self.files["train"] = self.text_file("train", train, "supervised")

    def streams(self, pools: dict[str, TokenPool]) -> dict[str, BatchSource]:
        """The one stream."""
        return {self.stream: PoolSource(pools["train"], self.batch_size, self.seed, self.stream)}
