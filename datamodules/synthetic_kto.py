"""Answers marked desirable or undesirable on the synthetic language."""

from typing import Any

import numpy as np
import torch

from datamodules.synthetic import (
    SyntheticDataModule,
    SyntheticStream,
    alignment_counts,
    stack_tokens,
)
from temper.data import Batch, make_rows, pair_rows
from temper.data.rows import exact_count
from temper.errors import TemperError
from temper.synthetic import Kind
from temper.synthetic.prompts import Prompts, join_prompts
from temper.synthetic.tokenizer import (
    PAD_ID,
    compliance_tokens,
    mismatched_tokens,
    prefix_tokens,
    refusal_tokens,
)


class SyntheticKTO(SyntheticDataModule):
    """Stream ``kto``: one answer to each prompt, with the flags ``desirable`` and ``unsafe``.

    Desirable is the right behaviour, a refusal to an unsafe prompt or an answer to a safe one;
    the other is undesirable. The second sequence of a row is its prompt with the mismatched answer
    of another row: the row before it in a seeded order. All refusals are equal (in `paper`
    those to texts of one length), so the mismatched answer of a row that refuses may equal its own.

    Args:
        n_rows: Rows of the stream, at least 2.
        safe_share: Share of them on safe prompts; ``safe_share * n_rows`` must be a whole number.
        desirable_share: Share of desirable rows, both among unsafe and among safe prompts; must
            give whole numbers of rows.
        batch_size: Rows per optimizer step, over all ranks.
        kwargs: See `SyntheticDataModule`.
    """

    def __init__(
        self,
        n_rows: int = 8000,
        safe_share: float = 0.5,
        desirable_share: float = 0.5,
        batch_size: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if n_rows < 2:
            raise TemperError(
                f"data.init_args.n_rows={n_rows}: the answer of another row is needed; give at"
                " least 2"
            )
        exact_count("safe_share", safe_share, "n_rows", n_rows)
        self.n_unsafe, self.n_safe = alignment_counts(n_rows, safe_share)
        self.n_desirable = {
            kind: exact_count("desirable_share", desirable_share, "n_rows", n) if n else 0
            for kind, n in ((Kind.UNSAFE, self.n_unsafe), (Kind.SAFE, self.n_safe))
        }
        self.batch_size = batch_size

    def streams(self) -> dict[str, SyntheticStream]:
        """Draw the one stream: rows on unsafe prompts, then on safe ones, the desirable first."""
        unsafe, safe = self.alignment_prompts(self.n_unsafe, self.n_safe)
        n_unsafe = self.n_desirable[Kind.UNSAFE]
        n_safe = self.n_desirable[Kind.SAFE]
        parts = [
            (unsafe[:n_unsafe], False),
            (unsafe[n_unsafe:], True),
            (safe[:n_safe], True),
            (safe[n_safe:], False),
        ]
        return {"kto": SyntheticStream(self._marked_rows(unsafe, safe), parts, self.batch_size)}

    def _marked_rows(self, unsafe: Prompts, safe: Prompts) -> Batch:
        """Rows ``B x 2 x T`` with their own answer and a mismatched one, and both flags."""
        desirable = np.concatenate(
            [np.arange(len(p)) < self.n_desirable[p.kind] for p in (unsafe, safe)]
        )
        is_unsafe = np.arange(len(desirable)) < len(unsafe)
        prompts = stack_tokens([prefix_tokens(self.language, p) for p in (unsafe, safe)])
        answers = stack_tokens([compliance_tokens(self.language, p) for p in (unsafe, safe)])
        refusals = stack_tokens(
            [refusal_tokens(self.language, p) for p in (unsafe, safe)], answers.shape[1]
        )
        responses = np.where((is_unsafe == desirable)[:, None], refusals, answers)
        order = self.rng("alignment", 1).permutation(len(responses))  # part 0 drew the prompts
        mismatched = np.empty_like(responses)
        mismatched[order] = responses[np.roll(order, 1)]
        mismatched = mismatched_tokens(self.language, join_prompts([unsafe, safe]), mismatched)
        rows = pair_rows(
            make_rows(prompts, responses, PAD_ID), make_rows(prompts, mismatched, PAD_ID)
        )
        return rows | {
            "desirable": torch.from_numpy(desirable),
            "unsafe": torch.from_numpy(is_unsafe),
        }
