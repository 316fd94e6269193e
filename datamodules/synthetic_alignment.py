"""Alignment data on the synthetic language: refusals, answers, and the harmful streams."""

from typing import Any

from datamodules.synthetic import SyntheticDataModule, SyntheticStream, alignment_counts
from temper.data import select
from temper.errors import TemperError
from temper.synthetic import Kind
from temper.synthetic.prompts import draw_prompts, prompt_keys


class SyntheticAlignment(SyntheticDataModule):
    """Streams ``alignment`` (unsafe prompts refused, safe ones answered), ``harmful`` and
    ``harmful_pairs``.

    The harmful stream answers the unsafe prompts of the alignment stream, as in the Booster paper:
    what the defender expects an attacker to train on. ``harmful_pairs`` has the same prompts in
    the same order, each with its answer first and its refusal second. Objectives ignore streams
    that they do not read.

    ``n_heldout`` adds two streams on unsafe prompts that are in no other stream:
    ``harmful_heldout`` answers them, ``heldout_pairs`` has their refusals first and answers
    second.

    Args:
        n_alignment: Rows of the alignment stream.
        safe_share: Share of them that are answers to safe prompts.
        n_harmful: Rows of the harmful stream; at most the unsafe rows of the alignment stream.
        batch_size: Alignment rows per optimizer step, over all ranks.
        harmful_batch_size: Harmful rows per optimizer step, over all ranks.
        n_heldout: Prompts of the held-out streams; 0: no such streams.
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
        if n_heldout < 0:
            raise TemperError(
                f"data.init_args.n_heldout={n_heldout}: give a whole number >= 0 (0: no held-out"
                " streams)"
            )
        self.n_harmful = n_harmful
        self.n_heldout = n_heldout
        self.batch_size = batch_size
        self.harmful_batch_size = harmful_batch_size
        self.heldout_batch_size = heldout_batch_size

    def streams(self) -> dict[str, SyntheticStream]:
        """Draw the alignment and harmful streams, and the held-out ones if there are any."""
        unsafe, safe = self.alignment_prompts(self.n_unsafe, self.n_safe)
        parts = [(unsafe, False), (safe, True)]
        first = slice(self.n_harmful)
        harmful = select(self.rows([(unsafe, True)]), first)
        pairs = select(self.pairs(unsafe, comply_first=True), first)
        carried_out = [(unsafe[first], True)]
        drawn = {
            "alignment": SyntheticStream(self.rows(parts), parts, self.batch_size),
            "harmful": SyntheticStream(harmful, carried_out, self.harmful_batch_size, order=1),
            "harmful_pairs": SyntheticStream(pairs, carried_out, self.harmful_batch_size, order=1),
        }
        if self.n_heldout:
            drawn |= self._heldout(prompt_keys(unsafe) + prompt_keys(safe))
        return drawn

    def _heldout(self, taken: list[bytes]) -> dict[str, SyntheticStream]:
        """Streams on unsafe prompts other than those taken, from their own random stream."""
        unsafe = draw_prompts(
            self.language, Kind.UNSAFE, self.n_heldout, "alignment", self.rng("alignment", 1), taken
        )
        self.check_overlap("held-out", [unsafe])
        harmful = self.rows([(unsafe, True)])
        pairs = self.pairs(unsafe, comply_first=False)
        size = self.heldout_batch_size
        return {
            "harmful_heldout": SyntheticStream(harmful, [(unsafe, True)], size, order=2),
            "heldout_pairs": SyntheticStream(pairs, [(unsafe, False)], size, order=2),
        }
