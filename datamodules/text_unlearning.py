"""Unlearning data from files: answers to forget, and answers to keep."""

from typing import Any, ClassVar

from datamodules.text import TextDataModule
from temper.data import Batch, BatchSource, PoolSource, sequence
from temper.data.pool import Pool
from temper.data.token_pool import TokenPool
from temper.errors import TemperError


class TextUnlearning(TextDataModule):
    """Streams ``forget`` (the answer to forget, and its substitute if the file has one) and
    ``retain``.

    Args:
        forget: File of prompts with the answer to forget; with a column ``substitute`` (or ``idk``)
            rows have two sequences.
        retain: File of prompts with the answers to keep; null: no such stream.
        holdout: File like ``forget`` that is never trained on, for the callback
            `UnlearningEvaluation`; null: none.
        batch_size: Forget rows per optimizer step, over all ranks.
        retain_batch_size: Retain rows per optimizer step, over all ranks.
        n_measured: Rows of each set that `UnlearningEvaluation` measures on, the first of the file.
        kwargs: See `TextDataModule`.
    """

    untrained: ClassVar = ("holdout",)
    one_answer: ClassVar = True

    def __init__(
        self,
        forget: str,
        retain: str | None = None,
        holdout: str | None = None,
        batch_size: int = 16,
        retain_batch_size: int = 16,
        n_measured: int = 200,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.batch_size = batch_size
        self.retain_batch_size = retain_batch_size
        self.n_measured = n_measured
        self.files["forget"] = self.text_file("forget", forget, "unlearning")
        if retain is not None:
            self.files["retain"] = self.text_file("retain", retain, "supervised")
        if holdout is not None:
            self.files["holdout"] = self.text_file("holdout", holdout, "supervised")

    def streams(self, pools: dict[str, TokenPool]) -> dict[str, BatchSource]:
        """Both streams."""
        made: dict[str, BatchSource] = {
            "forget": PoolSource(pools["forget"], self.batch_size, self.seed, "forget")
        }
        if "retain" in pools:
            made["retain"] = PoolSource(
                pools["retain"], self.retain_batch_size, self.seed + 1, "retain"
            )
        return made

    def unlearning_rows(self) -> dict[str, Batch]:
        """Rows that `callbacks.UnlearningEvaluation` measures on: prompts with their true answers,
        none of them perturbed.

        Raises:
            TemperError: a set has no file.
        """
        missing = [name for name in ("forget", "holdout", "retain") if name not in self._pools]
        if missing:
            raise TemperError(
                f"data.init_args.{missing[0]} is not set, and UnlearningEvaluation measures on it:"
                " give a file, or drop the callback"
            )
        return {
            name: _answers(self._pools[name], self.n_measured)
            for name in ("forget", "holdout", "retain")
        }


def _answers(pool: Pool, n_rows: int) -> Batch:
    """The first rows, without substitutes."""
    rows = pool[:n_rows]
    return sequence(rows, 0) if rows["input_ids"].ndim == 3 else rows
