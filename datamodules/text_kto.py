"""Answers marked desirable or undesirable, from a file."""

from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn

from datamodules.text import TextDataModule
from temper.data import BatchSource, PoolSource
from temper.data.pool import MismatchedPool
from temper.data.token_pool import TokenPool
from temper.errors import TemperError


class TextKTO(TextDataModule):
    """Stream ``kto``: one answer to each prompt, with the flag ``desirable``.

    The second sequence of a row is its prompt with the answer of another row, the one before it in
    a seeded order.

    Args:
        train: File of KTO rows.
        batch_size: Rows per optimizer step, over all ranks.
        kwargs: See `TextDataModule`.
    """

    one_answer: ClassVar = True

    def __init__(self, train: str, batch_size: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.batch_size = batch_size
        self.files["train"] = self.text_file("train", train, "kto")

    def streams(self, pools: dict[str, TokenPool]) -> dict[str, BatchSource]:
        """The one stream; warns if all its answers have the same mark.

        Raises:
            TemperError: there is one row only.
        """
        report = self.reports["train"]
        if not (report.desirable and report.undesirable):
            way_out = (
                "add undesirable ones, or train on these with TextSupervised"
                if report.desirable
                else "add desirable ones, or forget these with TextUnlearning"
            )
            rank_zero_warn(
                f"data.init_args.train={self.files['train'].path}: {report.desirable:,} rows are"
                f" desirable and {report.undesirable:,} undesirable, and KTO compares the two;"
                f" {way_out}"
            )
        if len(pools["train"]) < 2:
            raise TemperError(
                f"data.init_args.train={self.files['train'].path}: the answer of another row is"
                " needed; give at least 2 rows"
            )
        return {
            "kto": PoolSource(
                MismatchedPool(pools["train"], self.seed, self.encoder.max_length),
                self.batch_size,
                self.seed,
                "kto",
            )
        }
