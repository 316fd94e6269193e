"""Greedy generation for a batch of prompts, which drops finished rows as it goes.

Shapes: `B` prompts, `P` prompt tokens, `R` answer tokens, `S` stop tokens, `T` all tokens so far.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from temper.models.score import contiguous_head_inputs

# Finished rows are dropped from a batch once they are this share of it and answers may still grow
# by this many tokens; below that, restarting `generate` costs as much as it saves.
FINISHED_SHARE = 0.25
MIN_TOKENS_LEFT = 8


@torch.no_grad()
def generate_greedy(
    network: nn.Module,
    ids_BP: Tensor,
    mask_BP: Tensor,
    max_new_tokens: int,
    stop_ids: Sequence[int] | None = None,
    in_step: bool = False,
) -> Tensor:
    """Continue every prompt with the most likely tokens, up to a stop token.

    The key-value cache is used even if the network trains with activation checkpointing. When a
    quarter of a batch has finished, the rest continues as a smaller batch. The answers do not
    depend on the batch, except for ties that rounding breaks.

    Args:
        network: A causal LM, or PEFT's wrapper around one; in evaluation mode meanwhile.
        ids_BP: Token ids of the prompts, padded on the left.
        mask_BP: Attention mask: 0 where a prompt is padding.
        max_new_tokens: Longest answer, its stop token included.
        stop_ids: Tokens that end an answer; None takes those of the network's generation config.
        in_step: All ranks of a distributed run continue until the last answer of the last rank has
            ended, and no rows are dropped: for networks whose forward passes communicate.

    Returns:
        Token ids of the answers with their stop tokens, ``B x R``, padded on the right.
    """
    stops, pad_id = _stop_and_pad_ids(network.generation_config, stop_ids)
    tokens = {"eos_token_id": stops or None, "pad_token_id": pad_id}
    stops_S = ids_BP.new_tensor(stops)
    answers_BR = ids_BP.new_full((len(ids_BP), max_new_tokens), pad_id)
    rows = torch.arange(len(ids_BP), device=ids_BP.device)  # of the batch that are not finished
    ids = ids_BP
    mask = mask_BP
    cache = None
    done = 0
    was_training = network.training
    network.eval()
    try:
        while True:
            width = ids.shape[1]
            left = max_new_tokens - done
            criteria = [] if in_step else [_ManyFinished(stops_S, width, left)]
            settings = {"max_new_tokens": left, "stopping_criteria": criteria} | tokens
            reply = _generate(network, ids, mask, cache, synced_gpus=in_step, **settings)
            new = reply.sequences[:, width:]
            answers_BR[rows, done : done + new.shape[1]] = new
            done += new.shape[1]
            unfinished = ~torch.isin(new, stops_S).any(1)
            if in_step or done >= max_new_tokens or not unfinished.any():
                return answers_BR[:, :done]
            kept = unfinished.nonzero().flatten()
            cache = reply.past_key_values
            rows = rows[kept]
            ids = reply.sequences[kept]
            mask = torch.cat([mask[kept], mask.new_ones(len(kept), new.shape[1])], 1)
            if cache is not None:  # a network without a cache computes the whole row again
                cache.batch_select_indices(kept)
    finally:
        network.train(was_training)


def _generate(network: Any, ids: Tensor, mask: Tensor, cache: Any, **settings: Any) -> Any:
    """Continue a batch greedily; returns the sequences and the key-value cache."""
    with contiguous_head_inputs(network):
        return network.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
            **settings,
        )


def _stop_and_pad_ids(config: Any, stop_ids: Sequence[int] | None) -> tuple[list[int], int]:
    """Stop tokens (those of the generation config if None are given), and the pad token."""
    stops = config.eos_token_id if stop_ids is None else list(stop_ids)
    if stops is None:
        stops = []
    elif isinstance(stops, int):
        stops = [stops]
    return stops, config.pad_token_id if config.pad_token_id is not None else stops[0]


class _ManyFinished:
    """Stopping criterion: many rows of a batch have finished, and enough tokens are left."""

    def __init__(self, stops_S: Tensor, width: int, max_new_tokens: int) -> None:
        self.stops_S = stops_S
        self.width = width
        self.last = width + max_new_tokens - MIN_TOKENS_LEFT

    def __call__(self, ids_BT: Tensor, scores: Any, **_: Any) -> Tensor:
        """Stop all rows or none: bool, ``B``."""
        finished_B = torch.isin(ids_BT[:, self.width :], self.stops_S).any(1)
        many = finished_B.sum() >= FINISHED_SHARE * len(finished_B)
        return (many & (ids_BT.shape[1] < self.last)).expand(len(finished_B))
