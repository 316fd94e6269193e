"""Unlearning data on the synthetic language: answers to forget, with refusals as substitutes, and
answers to retain.
"""

from typing import Any

from datamodules.synthetic import SyntheticDataModule, SyntheticStream
from temper.errors import TemperError


class SyntheticUnlearning(SyntheticDataModule):
    """Streams ``forget`` (unsafe prompts: the answer to forget, and the refusal as its substitute)
    and ``retain`` (safe prompts, answered; on demand the refusal too).

    Every forget batch comes with a retain batch. Both are drawn without replacement: a pass over a
    stream has each of its rows once (except those that fill no batch), then a new order begins.
    The prompts are those of `SyntheticAlignment` with the same seed and as many unsafe and safe
    rows.

    Args:
        n_forget: Rows of the forget stream.
        n_retain: Rows of the retain stream.
        batch_size: Forget rows per optimizer step, over all ranks.
        retain_batch_size: Retain rows per optimizer step, over all ranks.
        retain_substitutes: Give retain rows the refusal as a second sequence, for the retain loss
            ``bounded``.
        kwargs: See `SyntheticDataModule`.
    """

    def __init__(
        self,
        n_forget: int = 4000,
        n_retain: int = 4000,
        batch_size: int = 32,
        retain_batch_size: int = 32,
        retain_substitutes: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for flag, value in (("n_forget", n_forget), ("n_retain", n_retain)):
            if value < 1:
                raise TemperError(
                    f"data.init_args.{flag}={value}: the stream is empty; give at least 1"
                )
        self.n_forget = n_forget
        self.n_retain = n_retain
        self.batch_size = batch_size
        self.retain_batch_size = retain_batch_size
        self.retain_substitutes = retain_substitutes

    def streams(self) -> dict[str, SyntheticStream]:
        """Draw both streams."""
        unsafe, safe = self.draw_alignment(self.n_forget, self.n_retain)
        self.check_overlap("forget", [unsafe])
        self.check_overlap("retain", [safe])
        pairs = self.pairs(unsafe, comply_first=True)
        answers = (
            self.pairs(safe, comply_first=True)
            if self.retain_substitutes
            else self.rows([(safe, True)])
        )
        return {
            "forget": SyntheticStream(pairs, [(unsafe, True)], self.batch_size),
            "retain": SyntheticStream(answers, [(safe, True)], self.retain_batch_size, order=1),
        }
