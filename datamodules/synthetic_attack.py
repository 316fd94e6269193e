"""The fine-tuning attack on the synthetic language: a user's task with a share of harmful rows, and
the alignment rows that defend it.
"""

from typing import Any

from datamodules.synthetic import SyntheticDataModule, SyntheticStream, alignment_counts
from temper.data.rows import harmful_count
from temper.errors import TemperError
from temper.synthetic import Kind
from temper.synthetic.prompts import Prompts, draw_prompts, prompt_keys


class SyntheticAttack(SyntheticDataModule):
    """Stream ``user`` with ``n_rows`` rows, exactly ``harmful_ratio * n_rows`` of them harmful; and
    stream ``alignment``, if ``n_alignment`` is given.

    The user's task is to carry out operators that are in no earlier stage; harmful rows answer
    unsafe prompts. Texts are disjoint from those of alignment and evaluation.

    There are two ways to defend the fine-tuning stage, both with the defender's own texts.
    ``n_safety`` mixes refusals into the user's set. ``n_alignment`` gives objectives such as
    `LisaModule` and `SafeInstructModule` a separate stream: the rows that `SyntheticAlignment` has
    with the same seed, number and share. Neither changes the user's other rows.

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
        for flag, value in (("n_safety", n_safety), ("n_alignment", n_alignment)):
            if value < 0:
                raise TemperError(
                    f"data.init_args.{flag}={value}: give a number of rows, 0 for none"
                )
        self.n_safety = n_safety
        self.n_unsafe, self.n_safe = alignment_counts(n_alignment, safe_share)
        self.split = split
        self.batch_size = batch_size
        self.alignment_batch_size = alignment_batch_size

    def streams(self) -> dict[str, SyntheticStream]:
        """Draw the user's stream, and the alignment stream if there is one."""
        rng = self.rng("attack")
        task = draw_prompts(self.language, Kind.TASK, self.n_task, self.split, rng)
        unsafe = draw_prompts(
            self.language, Kind.UNSAFE, self.n_harmful, self.split, rng, prompt_keys(task)
        )
        self.check_overlap("attack", [task, unsafe])
        user = [(task, True), (unsafe, True), (self._safety(unsafe), False)]
        drawn = {"user": SyntheticStream(self.rows(user), user, self.batch_size)}
        if self.n_unsafe + self.n_safe:
            refused, answered = self.alignment_prompts(self.n_unsafe, self.n_safe)
            parts = [(refused, False), (answered, True)]
            drawn["alignment"] = SyntheticStream(
                self.rows(parts), parts, self.alignment_batch_size, order=1
            )
        return drawn

    def _safety(self, carried_out: Prompts) -> Prompts:
        """Unsafe prompts to refuse, from their own random stream and texts; none of them is carried
        out in another row.
        """
        rng = self.rng("alignment", 3)
        safety = draw_prompts(
            self.language, Kind.UNSAFE, self.n_safety, "alignment", rng, prompt_keys(carried_out)
        )
        self.check_overlap("safety", [safety])
        return safety
