"""Instruction data on the synthetic language: every operator is carried out, none refused."""

from typing import Any

import numpy as np

from datamodules.synthetic import ROLES, SyntheticDataModule
from temper.data import Batch, fingerprint, make_rows
from temper.synthetic import Kind
from temper.synthetic.prompts import draw_batch
from temper.synthetic.tokenizer import PAD_ID, compliance_tokens, prompt_tokens


class SyntheticInstruct(SyntheticDataModule):
    """Stream ``instruct``: endless new rows for pre-training and instruction tuning.

    Args:
        batch_size: Rows per optimizer step, over all ranks.
        epoch_batches: Batches per epoch; the stream itself never repeats.
        train_on_prompt: Whether prompts are trained too (pre-training), instead of answers alone.
        kwargs: See `SyntheticDataModule`.
    """

    def __init__(
        self,
        batch_size: int = 64,
        epoch_batches: int = 1000,
        train_on_prompt: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.batch_size = batch_size
        self.batches_per_pass = epoch_batches
        self.train_on_prompt = train_on_prompt

    def setup(self, stage: str) -> None:
        """Draw the evaluation prompts. There are no probe rows and no fixed training rows: `batch`
        draws each batch when it is needed.
        """
        self.setup_evaluation()
        self.sources = {"instruct": self}

    def fingerprint(self) -> str:
        """SHA-256 of the first batch, which depends on seed and language as every batch does."""
        return fingerprint(self.batch(0))

    def batch(self, number: int) -> Batch:
        """Global batch ``number`` of the stream."""
        rng = np.random.default_rng([self.seed, ROLES["instruct"], number])
        prompts = draw_batch(self.language, Kind.INSTRUCT, self.batch_size, "instruct", rng)
        return make_rows(
            prompt_tokens(self.language, prompts),
            compliance_tokens(self.language, prompts),
            PAD_ID,
            self.train_on_prompt,
        )
