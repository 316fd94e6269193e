"""Alignment data on the synthetic language: refusals, answers, and the harmful streams."""

from typing import Any

from datamodules.synthetic import SyntheticDataModule, alignment_counts
from temper.data import PoolSource
from temper.errors import TemperError
from temper.synthetic import Kind
from temper.synthetic.prompts import draw_prompts, prompt_keys


class SyntheticAlignment(SyntheticDataModule):
    """Streams ``alignment`` (unsafe prompts refused, safe ones answered) and ``harmful``.

    The harmful stream answers the unsafe prompts of the alignment stream, as in the Booster paper:
    what the defender imagines an attacker would train on. ``harmful_pairs`` has the same prompts in
    the same order, each with its answer first and its refusal second. Objectives ignore streams
    that they do not read.

    With ``n_heldout`` there are two streams more on unsafe prompts that no other stream shows:
    ``harmful_heldout`` answers them, ``heldout_pairs`` holds their refusals first and answers
    second.

    Args:
        n_alignment: Rows of the alignment stream.
        safe_share: Share of them that are answers to safe prompts.
        n_harmful: Rows of the harmful stream; at most the unsafe rows of the alignment stream.
        batch_size: Alignment rows per optimizer step, over all ranks.
        harmful_batch_size: Harmful rows per optimizer step, over all ranks.
        n_heldout: Prompts of the held-out streams; 0 is no such streams.
        heldout_batch_size: Held-out rows per optimizer step, over all ranks.
        kwargs: See `SyntheticDataModule`.
    """

    def __init__(
        self,
        n_alignment: int = 8000,
        safe_share: float = 0.5,
        n_harmful: int = 4000,
        batch_size: int = 64,
        harmful_batch_size: int = 64,
        n_heldout: int = 0,
        heldout_batch_size: int = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.n_unsafe, self.n_safe = alignment_counts(n_alignment, safe_share)
        if not 1 <= n_harmful <= self.n_unsafe:
            raise TemperError(
                f"data.init_args.n_harmful={n_harmful}: give 1 to {self.n_unsafe}, the unsafe"
                " prompts of the alignment stream"
            )
        self.n_harmful = n_harmful
        self.batch_size, self.harmful_batch_size = batch_size, harmful_batch_size
        if n_heldout < 0:
            raise TemperError(
                f"data.init_args.n_heldout={n_heldout}: give a whole number >= 0 (0 is no held-out"
                " stream)"
            )
        self.n_heldout, self.heldout_batch_size = n_heldout, heldout_batch_size

    def setup(self, stage: str) -> None:
        """Draw all rows, and check that none is an evaluation prompt."""
        self.setup_evaluation()
        self.setup_probe()
        unsafe, safe = self.alignment_prompts(self.n_unsafe, self.n_safe)
        harmful = {
            name: value[: self.n_harmful] for name, value in self.rows([(unsafe, True)]).items()
        }
        pairs = {
            name: value[: self.n_harmful]
            for name, value in self.pairs(unsafe, comply_first=True).items()
        }
        self.sources = {
            "alignment": PoolSource(
                self.rows([(unsafe, False), (safe, True)]), self.batch_size, self.seed, "alignment"
            ),
            "harmful": PoolSource(harmful, self.harmful_batch_size, self.seed + 1, "harmful"),
            "harmful_pairs": PoolSource(
                pairs, self.harmful_batch_size, self.seed + 1, "harmful_pairs"
            ),
        }
        if self.n_heldout:
            self.sources |= self._heldout(prompt_keys(unsafe) + prompt_keys(safe))

    def _heldout(self, taken: list[bytes]) -> dict[str, PoolSource]:
        """Streams on unsafe prompts of their own, from a random stream of their own."""
        unsafe = draw_prompts(
            self.language, Kind.UNSAFE, self.n_heldout, "alignment", self.rng("alignment", 1), taken
        )
        self.check_overlap("held-out", [unsafe])
        rows = {
            "harmful_heldout": self.rows([(unsafe, True)]),
            "heldout_pairs": self.pairs(unsafe, comply_first=False),
        }
        return {
            name: PoolSource(pool, self.heldout_batch_size, self.seed + 2, name)
            for name, pool in rows.items()
        }
