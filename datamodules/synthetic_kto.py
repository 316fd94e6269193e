"""Answers marked desirable or undesirable on the synthetic language."""

from typing import Any

import numpy as np
import torch

from datamodules.synthetic import SyntheticDataModule, alignment_counts, stack_tokens
from temper.data import Batch, PoolSource, make_rows, pair_rows
from temper.data.rows import exact_count
from temper.errors import TemperError
from temper.synthetic import Kind
from temper.synthetic.prompts import Prompts
from temper.synthetic.tokenizer import PAD_ID, compliance_tokens, prompt_tokens, refusal_tokens


class SyntheticKTO(SyntheticDataModule):
    """Stream ``kto``: one answer to each prompt, with the flags ``desirable`` and ``unsafe``.

    Desirable is the right behaviour, a refusal to an unsafe prompt or an answer to a safe one;
    undesirable the other. The second sequence of a row is its prompt with the answer of another
    row: rows in a seeded order, answers moved on by one. Refusals are all alike, so the mismatched
    answer of a refusing row may be its own.

    Args:
        n_rows: Rows.
        safe_share: Share of them on safe prompts; times n_rows must be a whole number.
        desirable_share: Share of desirable rows, among unsafe and among safe prompts alike; must
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

    def setup(self, stage: str) -> None:
        """Draw all rows; none is an evaluation prompt."""
        self.setup_evaluation()
        self.setup_probe()
        unsafe, safe = self.alignment_prompts(self.n_unsafe, self.n_safe)
        self.sources = {
            "kto": PoolSource(self._pool(unsafe, safe), self.batch_size, self.seed, "kto")
        }

    def _pool(self, unsafe: Prompts, safe: Prompts) -> Batch:
        """All rows, with their own answer and with another's."""
        desirable = np.concatenate(
            [np.arange(len(p)) < self.n_desirable[p.kind] for p in (unsafe, safe)]
        )
        is_unsafe = np.arange(len(desirable)) < len(unsafe)
        prompts = stack_tokens([prompt_tokens(self.language, p) for p in (unsafe, safe)])
        answers = stack_tokens([compliance_tokens(self.language, p) for p in (unsafe, safe)])
        refusals = stack_tokens([refusal_tokens(p) for p in (unsafe, safe)], answers.shape[1])
        responses = np.where((is_unsafe == desirable)[:, None], refusals, answers)
        order = self.rng("alignment", 1).permutation(len(responses))  # part 0 drew the prompts
        mismatched = np.empty_like(responses)
        mismatched[order] = responses[np.roll(order, 1)]
        rows = pair_rows(
            make_rows(prompts, responses, PAD_ID), make_rows(prompts, mismatched, PAD_ID)
        )
        return rows | {
            "desirable": torch.from_numpy(desirable),
            "unsafe": torch.from_numpy(is_unsafe),
        }
