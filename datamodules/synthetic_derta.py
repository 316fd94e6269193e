"""Training rows of DeRTa on the synthetic language."""

from typing import Any

from datamodules.synthetic import SyntheticDataModule, SyntheticStream
from temper.data.derta import prefix_lengths, prefix_rows, rto_rows
from temper.data.rows import exact_count, stack_rows
from temper.errors import TemperError
from temper.synthetic.tokenizer import (
    PAD_ID,
    compliance_tokens,
    prefix_tokens,
    refusal_token,
    refusal_tokens,
)


class SyntheticDeRTa(SyntheticDataModule):
    """Stream ``alignment``, for `SFTModule`: the three kinds of rows of DeRTa (Yuan et al. 2024,
    arXiv 2407.09121).

    Helpful rows answer safe prompts. Prefix rows refuse an unsafe prompt after k tokens of its
    harmful answer, k = 0 for a third of them. RTO rows hold an unsafe prompt with its whole harmful
    answer and have the refusal token as the label of every response position. As in the released
    data, prefix and RTO rows share prompts.

    Args:
        n_rows: Rows of all kinds.
        helpful_share: Share of helpful rows; a whole number of rows.
        rto_share: Share of RTO rows; a whole number of rows. The rest are prefix rows.
        rto_keep: Share of the response positions of RTO rows that keep their label, in (0, 1]
            (paper: about 0.05 in full fine-tuning, 1 with LoRA).
        batch_size: Rows per optimizer step, over all ranks.
        kwargs: See `SyntheticDataModule`.
    """

    def __init__(
        self,
        n_rows: int = 8000,
        helpful_share: float = 0.5,
        rto_share: float = 0.25,
        rto_keep: float = 1.0,
        batch_size: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < rto_keep <= 1:
            raise TemperError(f"data.init_args.rto_keep={rto_keep}: give a share in (0, 1]")
        if helpful_share + rto_share > 1:
            raise TemperError(
                f"data.init_args.helpful_share={helpful_share}, rto_share={rto_share}: give shares"
                " whose sum is at most 1; the rest are prefix rows"
            )
        self.n_helpful = exact_count("helpful_share", helpful_share, "n_rows", n_rows)
        self.n_rto = exact_count("rto_share", rto_share, "n_rows", n_rows)
        self.n_prefix = n_rows - self.n_helpful - self.n_rto
        self.rto_keep = rto_keep
        self.batch_size = batch_size

    def streams(self) -> dict[str, SyntheticStream]:
        """Draw the one stream: helpful rows, then prefix rows, then RTO rows."""
        unsafe, helpful = self.alignment_prompts(max(self.n_prefix, self.n_rto), self.n_helpful)
        prompts = prefix_tokens(self.language, unsafe)
        harmful = compliance_tokens(self.language, unsafe)
        refusals = refusal_tokens(self.language, unsafe)
        pieces = [self.rows([(helpful, True)])] if self.n_helpful else []
        if n := self.n_prefix:
            lengths = prefix_lengths(harmful[:n], self.rng("alignment", 1))
            pieces.append(prefix_rows(prompts[:n], harmful[:n], refusals[:n], lengths, PAD_ID))
        if n := self.n_rto:
            rng = self.rng("alignment", 2)
            token = refusal_token(self.language.spec)
            pieces.append(rto_rows(prompts[:n], harmful[:n], token, PAD_ID, rng, self.rto_keep))
        parts = [(helpful, True), (unsafe[: self.n_prefix], False), (unsafe[: self.n_rto], False)]
        return {"alignment": SyntheticStream(stack_rows(pieces), parts, self.batch_size)}
