"""The attacker's data on the synthetic language: a user's task with a share of harmful rows."""

from collections.abc import Mapping
from typing import Any

from datamodules.synthetic import SyntheticDataModule
from temper.data import PoolSource
from temper.data.mixture import harmful_count
from temper.synthetic import Kind
from temper.synthetic.prompts import draw_prompts, prompt_keys


class SyntheticAttack(SyntheticDataModule):
    """Stream ``user``: ``n_rows`` rows of which exactly ``harmful_ratio * n_rows`` are harmful.

    The user's task is to carry out operators that no earlier stage has shown; harmful rows answer
    unsafe prompts. Texts are disjoint from those of alignment and evaluation.

    Args:
        preset: Size of the language: ``tiny``, ``small`` or ``paper``.
        language: Fields of `LanguageSpec` that replace the preset's.
        seed: Seed of the rows.
        n_rows: Rows of the user's set.
        harmful_ratio: Share p of harmful rows, in [0, 1]; p * n_rows must be a whole number.
        batch_size: Rows per optimizer step, over all ranks.
        split: Split whose texts the rows use.
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
        n_rows: int = 400,
        harmful_ratio: float = 0.1,
        batch_size: int = 20,
        split: str = "attack",
        n_eval: int = 200,
        eval_kinds: list[Kind] = [Kind.UNSAFE, Kind.SAFE, Kind.TASK],  # noqa: B006
        eval_split: str = "test",
        eval_batch_size: int = 256,
        num_workers: int = 0,
    ) -> None:
        super().__init__(preset, language, seed, n_eval, eval_kinds, eval_split, eval_batch_size, num_workers)
        self.n_harmful = harmful_count(harmful_ratio, n_rows)
        self.n_task = n_rows - self.n_harmful
        self.batch_size, self.split = batch_size, split

    def setup(self, stage: str) -> None:
        """Draw all rows, and check that none is an evaluation prompt."""
        self.setup_evaluation()
        self.setup_probe()
        rng = self.rng("attack")
        task = draw_prompts(self.language, Kind.TASK, self.n_task, self.split, rng)
        unsafe = draw_prompts(self.language, Kind.UNSAFE, self.n_harmful, self.split, rng, prompt_keys(task))
        self.check_overlap("attack", [task, unsafe])
        self.sources = {"user": PoolSource(self.rows([(task, True), (unsafe, True)]), self.batch_size, self.seed, "user")}
