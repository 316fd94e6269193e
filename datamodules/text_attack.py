"""The fine-tuning attack with a user's files: rows of a task, a share of them harmful."""

from typing import Any

from datamodules.text import TextDataModule
from temper.data import BatchSource, PoolSource
from temper.data.pool import JoinedPool, Subset
from temper.data.rows import harmful_count
from temper.data.token_pool import TokenPool
from temper.errors import TemperError


class TextAttack(TextDataModule):
    """Stream ``user``: rows of the user's file, of which exactly ``harmful_ratio * n_rows`` are
    replaced by harmful ones.

    If its file is given, also stream ``alignment``, which objectives of the fine-tuning stage
    (`LisaModule`, `SafeInstructModule`) read beside it. Rows are drawn without replacement by the
    seed: with the same seed a larger share has the harmful rows of a smaller one.

    Args:
        user: File of the user's rows.
        n_rows: Rows of the stream; null: all of the user's file, with no harmful ones.
        harmful: File of unsafe prompts with answers that carry them out.
        harmful_ratio: Share p of harmful rows, in [0, 1]; p * n_rows must be a whole number.
        alignment: File of the defender's rows; null: no such stream.
        batch_size: Rows per optimizer step, over all ranks.
        alignment_batch_size: Alignment rows per optimizer step, over all ranks.
        kwargs: See `TextDataModule`.
    """

    def __init__(
        self,
        user: str,
        n_rows: int | None = None,
        harmful: str | None = None,
        harmful_ratio: float = 0.0,
        alignment: str | None = None,
        batch_size: int = 16,
        alignment_batch_size: int = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if harmful_ratio and n_rows is None:
            raise TemperError(
                f"data.init_args.harmful_ratio={harmful_ratio}: of how many rows? Set n_rows, for"
                " example 1000"
            )
        self.n_rows = n_rows
        self.n_harmful = 0 if n_rows is None else harmful_count(harmful_ratio, n_rows)
        if self.n_harmful and harmful is None:
            raise TemperError(
                f"data.init_args.harmful_ratio={harmful_ratio}: give a file of harmful rows"
                " (data.init_args.harmful)"
            )
        self.batch_size = batch_size
        self.alignment_batch_size = alignment_batch_size
        self.files["user"] = self.text_file("user", user, "supervised")
        for name, path in (("harmful", harmful), ("alignment", alignment)):
            if path is not None:
                self.files[name] = self.text_file(name, path, "supervised")

    def streams(self, pools: dict[str, TokenPool]) -> dict[str, BatchSource]:
        """The mixture, and the defender's rows."""
        n_task = len(pools["user"]) if self.n_rows is None else self.n_rows - self.n_harmful
        subsets = [Subset(pools["user"], self.draw("user", pools["user"], n_task, 1))]
        if self.n_harmful:
            subsets.append(
                Subset(pools["harmful"], self.draw("harmful", pools["harmful"], self.n_harmful, 2))
            )
        made: dict[str, BatchSource] = {
            "user": PoolSource(JoinedPool(*subsets), self.batch_size, self.seed, "user")
        }
        if "alignment" in pools:
            made["alignment"] = PoolSource(
                pools["alignment"], self.alignment_batch_size, self.seed + 1, "alignment"
            )
        return made
