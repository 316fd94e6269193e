"""The attacker's data on the synthetic language: a user's task with a share of harmful rows.

And what a defender of the fine-tuning stage puts beside it.
"""

from typing import Any

from datamodules.synthetic import SyntheticDataModule, alignment_counts
from temper.data import PoolSource
from temper.data.rows import harmful_count
from temper.errors import TemperError
from temper.synthetic import Kind
from temper.synthetic.prompts import draw_prompts, prompt_keys


class SyntheticAttack(SyntheticDataModule):
    """Stream ``user``: ``n_rows`` rows of which exactly ``harmful_ratio * n_rows`` are harmful; on
    request stream ``alignment``.

    The user's task is to carry out operators that no earlier stage has shown; harmful rows answer
    unsafe prompts. Texts are disjoint from those of alignment and evaluation.

    Two ways to defend the fine-tuning stage, both with the defender's own texts: ``n_safety`` mixes
    refusals into the user's set, ``n_alignment`` gives objectives such as `LisaModule` and
    `SafeInstructModule` a stream of their own, the rows that `SyntheticAlignment` has with the same
    seed, number and share. Neither changes the user's other rows.

    Args:
        n_rows: Rows of the user's set.
        harmful_ratio: Share p of harmful rows, in [0, 1]; p * n_rows must be a whole number.
        batch_size: Rows per optimizer step, over all ranks.
        split: Split whose texts the rows use.
        n_safety: Refusals to unsafe prompts that are added to the user's ``n_rows``.
        n_alignment: Rows of the stream ``alignment`` (unsafe prompts refused, safe ones answered);
            0: no such stream.
        safe_share: Share of them that are answers to safe prompts.
        alignment_batch_size: Alignment rows per optimizer step, over all ranks.
        eval_kinds: Kinds of evaluation prompts.
        kwargs: See `SyntheticDataModule`.
    """

    def __init__(
        self,
        n_rows: int = 400,
        harmful_ratio: float = 0.1,
        batch_size: int = 20,
        split: str = "attack",
        n_safety: int = 0,
        n_alignment: int = 0,
        safe_share: float = 0.5,
        alignment_batch_size: int = 20,
        eval_kinds: list[Kind] = [Kind.UNSAFE, Kind.SAFE, Kind.TASK],  # noqa: B006
        **kwargs: Any,
    ) -> None:
        super().__init__(eval_kinds=eval_kinds, **kwargs)
        self.n_harmful = harmful_count(harmful_ratio, n_rows)
        self.n_task = n_rows - self.n_harmful
        self.batch_size, self.split = batch_size, split
        for flag, value in (("n_safety", n_safety), ("n_alignment", n_alignment)):
            if value < 0:
                raise TemperError(
                    f"data.init_args.{flag}={value}: give a number of rows, 0 for none"
                )
        self.n_safety, self.alignment_counts = n_safety, alignment_counts(n_alignment, safe_share)
        self.alignment_batch_size = alignment_batch_size

    def setup(self, stage: str) -> None:
        """Draw all rows, and check that none is an evaluation prompt."""
        self.setup_evaluation()
        self.setup_probe()
        rng = self.rng("attack")
        task = draw_prompts(self.language, Kind.TASK, self.n_task, self.split, rng)
        unsafe = draw_prompts(
            self.language, Kind.UNSAFE, self.n_harmful, self.split, rng, prompt_keys(task)
        )
        self.check_overlap("attack", [task, unsafe])
        # A random stream and texts of their own; the same prompt must not be both refused and
        # carried out.
        safety = draw_prompts(
            self.language,
            Kind.UNSAFE,
            self.n_safety,
            "alignment",
            self.rng("alignment", 3),
            prompt_keys(unsafe),
        )
        self.check_overlap("safety", [safety])
        user = self.rows([(task, True), (unsafe, True), (safety, False)])
        self.sources = {"user": PoolSource(user, self.batch_size, self.seed, "user")}
        if any(self.alignment_counts):
            refused, answered = self.alignment_prompts(*self.alignment_counts)
            alignment = self.rows([(refused, False), (answered, True)])
            self.sources["alignment"] = PoolSource(
                alignment, self.alignment_batch_size, self.seed + 1, "alignment"
            )
