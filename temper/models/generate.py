"""Greedy answers to a batch of prompts, without computing what is thrown away.

Shapes: `B` prompts, `P` prompt tokens, `R` answer tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from temper.models.score import contiguous_head_inputs

# Finished rows are taken out of a batch when they are this share of it, and answers may still grow
# by so many tokens: below that, starting again costs what it saves.
ENDED_SHARE = 0.25
LEAST_LEFT = 8


@torch.no_grad()
def generate_greedy(
    network: nn.Module,
    ids_BP: Tensor,
    mask_BP: Tensor,
    max_new_tokens: int,
    stop_ids: Sequence[int] | None = None,
    in_step: bool = False,
) -> Tensor:
    """Continue every prompt with the likeliest tokens, up to an end token.

    Prompts have a key-value cache, also of a network that is trained with activation checkpointing.
    When a quarter of a batch has ended, the rest goes on as a smaller batch. The answers do not
    depend on the batch, but for ties that rounding breaks.

    Args:
        network: A causal LM of transformers, or PEFT's wrapper around one; it is put into
            evaluation mode meanwhile.
        ids_BP: Prompts, padded on the left.
        mask_BP: Where they are no padding.
        max_new_tokens: Longest answer, its end token included.
        stop_ids: Tokens that end an answer; None takes those of the network's generation config.
        in_step: All ranks of a distributed run go on until the last answer of the last rank has
            ended, and no batch gets smaller: for networks whose forward passes communicate.

    Returns:
        Answers with their end tokens, padded on the right to the longest: ids, ``B x R``.
    """
    config: Any = network.generation_config
    ends = config.eos_token_id if stop_ids is None else list(stop_ids)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    pad_id = config.pad_token_id if config.pad_token_id is not None else ends[0]
    end_ids, answers_BR = (
        ids_BP.new_tensor(ends),
        ids_BP.new_full((len(ids_BP), max_new_tokens), pad_id),
    )
    rows, ids, mask, cache, done = (
        torch.arange(len(ids_BP), device=ids_BP.device),
        ids_BP,
        mask_BP,
        None,
        0,
    )
    was_training = network.training
    network.eval()
    try:
        while True:
            with contiguous_head_inputs(network):
                reply = network.generate(  # type: ignore[operator]
                    input_ids=ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    max_new_tokens=max_new_tokens - done,
                    do_sample=False,
                    use_cache=True,
                    eos_token_id=ends or None,
                    pad_token_id=pad_id,
                    stopping_criteria=(
                        []
                        if in_step
                        else [_ManyEnded(end_ids, ids.shape[1], max_new_tokens - done)]
                    ),
                    return_dict_in_generate=True,
                    synced_gpus=in_step,
                )
            written = reply.sequences[:, ids.shape[1] :]
            answers_BR[rows, done : done + written.shape[1]] = written
            done += written.shape[1]
            going = ~torch.isin(written, end_ids).any(1)
            if in_step or done >= max_new_tokens or not going.any():
                return answers_BR[:, :done]
            kept = going.nonzero().flatten()
            cache, rows, ids = reply.past_key_values, rows[kept], reply.sequences[kept]
            mask = torch.cat([mask[kept], mask.new_ones(len(kept), written.shape[1])], 1)
            if cache is not None:  # a network that has none computes the whole row again
                cache.batch_select_indices(kept)
    finally:
        network.train(was_training)


class _ManyEnded:
    """Stops a whole batch once many of its rows have ended, unless only a few tokens are left."""

    def __init__(self, end_ids: Tensor, begin: int, max_new_tokens: int) -> None:
        self.end_ids, self.begin, self.last = end_ids, begin, begin + max_new_tokens - LEAST_LEFT

    def __call__(self, ids_BT: Tensor, scores: Any, **_: Any) -> Tensor:
        ended_B = torch.isin(ids_BT[:, self.begin :], self.end_ids).any(1)
        stop = (ended_B.sum() >= ENDED_SHARE * len(ended_B)) & (ids_BT.shape[1] < self.last)
        return stop.expand(len(ended_B))
