"""Alignment data on the synthetic language: refusals, answers, and the harmful stream."""

from collections.abc import Mapping
from typing import Any

from datamodules.synthetic import SyntheticDataModule
from temper.data import PoolSource
from temper.errors import TemperError
from temper.synthetic import Kind
from temper.synthetic.prompts import draw_prompts, prompt_keys


class SyntheticAlignment(SyntheticDataModule):
    """Streams ``alignment`` (unsafe prompts refused, safe ones answered) and ``harmful``.

    The harmful stream answers the unsafe prompts of the alignment stream, as in the Booster paper:
    what the defender imagines an attacker would train on. Objectives that do not read it ignore it.

    Args:
        preset: Size of the language: ``tiny``, ``small`` or ``paper``.
        language: Fields of `LanguageSpec` that replace the preset's.
        seed: Seed of the rows.
        n_alignment: Rows of the alignment stream.
        safe_share: Share of them that are answers to safe prompts.
        n_harmful: Rows of the harmful stream; at most the unsafe rows of the alignment stream.
        batch_size: Alignment rows per optimizer step, over all ranks.
        harmful_batch_size: Harmful rows per optimizer step, over all ranks.
        n_eval: Evaluation prompts of each kind.
        eval_kinds: Kinds of evaluation prompts.
        eval_split: Split whose texts the evaluation prompts use.
        eval_batch_size: Prompts per generation batch.
        num_workers: Loader processes; 0 makes batches in the training process.
    """

    def __init__(
        self,
        preset: str = "small",
        language: Mapping[str, Any] | None = None,
        seed: int = 0,
        n_alignment: int = 8000,
        safe_share: float = 0.5,
        n_harmful: int = 4000,
        batch_size: int = 64,
        harmful_batch_size: int = 64,
        n_eval: int = 200,
        eval_kinds: list[Kind] = [Kind.UNSAFE, Kind.SAFE],  # noqa: B006
        eval_split: str = "test",
        eval_batch_size: int = 256,
        num_workers: int = 0,
    ) -> None:
        super().__init__(preset, language, seed, n_eval, eval_kinds, eval_split, eval_batch_size, num_workers)
        if not 0 <= safe_share < 1:
            raise TemperError(f"data.init_args.safe_share={safe_share}: give a share in [0, 1)")
        self.n_safe = round(n_alignment * safe_share)
        self.n_unsafe = n_alignment - self.n_safe
        if not 1 <= n_harmful <= self.n_unsafe:
            raise TemperError(
                f"data.init_args.n_harmful={n_harmful}: give 1 to {self.n_unsafe}, the unsafe prompts of the alignment stream"
            )
        self.n_harmful = n_harmful
        self.batch_size, self.harmful_batch_size = batch_size, harmful_batch_size

    def setup(self, stage: str) -> None:
        """Draw all rows, and check that none is an evaluation prompt."""
        self.setup_evaluation()
        self.setup_probe()
        rng = self.rng("alignment")
        unsafe = draw_prompts(self.language, Kind.UNSAFE, self.n_unsafe, "alignment", rng)
        safe = draw_prompts(self.language, Kind.SAFE, self.n_safe, "alignment", rng, prompt_keys(unsafe))
        self.check_overlap("alignment", [unsafe, safe])
        harmful = {name: value[: self.n_harmful] for name, value in self.rows([(unsafe, True)]).items()}
        self.sources = {
            "alignment": PoolSource(self.rows([(unsafe, False), (safe, True)]), self.batch_size, self.seed, "alignment"),
            "harmful": PoolSource(harmful, self.harmful_batch_size, self.seed + 1, "harmful"),
        }
