"""Rows of DeRTa: refusals that may begin anywhere in an answer.

Yuan et al. 2024 (arXiv 2407.09121), on arrays of token ids; knows no tokenizer. Answers end with
their end token and, like prompts, are padded on the right with -1.

Shapes: `B` rows, `P` prompt tokens, `R` response tokens, `S` tokens of a refusal, `T` tokens of a
row.
"""

import numpy as np
import torch

from temper.data.rows import Batch, make_rows
from temper.losses import IGNORE_INDEX


def prefix_lengths(
    harmful_BR: np.ndarray, rng: np.random.Generator, zero_share: float = 1 / 3
) -> np.ndarray:
    """Draw the number of tokens of each harmful answer that come before the refusal: k_B.

    Exactly ``round(zero_share * B)`` rows, drawn at random, have k = 0, a plain refusal; the others
    a k that is uniform over 1 to the length of their answer, its end token not counted. (Released
    code: words instead of tokens, every third row 0, and at least two words of the answer are left
    out.)
    """
    lengths = (harmful_BR != -1).sum(1) - 1
    k_B = rng.integers(1, np.maximum(lengths, 1) + 1)
    k_B[rng.permutation(len(k_B))[: round(zero_share * len(k_B))]] = 0
    shortened: np.ndarray = np.minimum(k_B, lengths)
    return shortened


def prefix_rows(
    prompt_BP: np.ndarray, harmful_BR: np.ndarray, safe_BS: np.ndarray, k_B: np.ndarray, pad_id: int
) -> Batch:
    """Prompt, k tokens of the harmful answer, safe answer; labels on the safe answer alone (paper:
    section 3.1).

    Raises:
        ValueError: a prefix would be longer than the answer without its end token.
    """
    if (k_B >= (harmful_BR != -1).sum(1)).any() or (k_B < 0).any():
        raise ValueError("a prefix holds 0 tokens up to all but the end token of its answer")
    prefix_BR = np.where(np.arange(harmful_BR.shape[1]) < k_B[:, None], harmful_BR, -1)
    return make_rows(np.concatenate([prompt_BP, prefix_BR], axis=1), safe_BS, pad_id)


def rto_rows(
    prompt_BP: np.ndarray,
    harmful_BR: np.ndarray,
    refusal_token: int,
    pad_id: int,
    rng: np.random.Generator,
    keep: float = 1.0,
) -> Batch:
    """Prompt and harmful answer; the label of every response position is the first token of a
    refusal (RTO, section 3.2).

    The position of response token t is the one that predicts it: the first follows the prompt
    alone, the last follows the whole answer but its end token.

    Args:
        prompt_BP: Prompts.
        harmful_BR: Harmful answers.
        refusal_token: First token of a refusal.
        pad_id: Written where there is no token.
        rng: Chooses the positions that are kept.
        keep: Share of the response positions of all rows that keep their label, to the nearest
            whole number and at least one; the choice is made once. (Released code: LoRA keeps all;
            full fine-tuning draws 5 % of all positions of a row, prompt included, anew at every
            step.)
    """
    rows = make_rows(prompt_BP, harmful_BR, pad_id)
    positions = np.argwhere(rows["labels"].numpy() != IGNORE_INDEX)
    kept = (
        positions[rng.permutation(len(positions))[: max(1, round(keep * len(positions)))]]
        if keep < 1
        else positions
    )
    labels = torch.full_like(rows["labels"], IGNORE_INDEX)
    labels[kept[:, 0], kept[:, 1]] = refusal_token
    return rows | {"labels": labels}
