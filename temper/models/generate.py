"""Greedy generation for a batch of prompts, which drops finished rows as it goes.

Greedy is greedy: of a model's generation config only the special tokens are used.

Shapes: `B` prompts, `P` prompt tokens, `R` answer tokens, `S` stop tokens, `T` all tokens so far.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from temper.models.end_tokens import end_tokens
from temper.models.score import contiguous_head_inputs

# Finished rows are dropped from a batch once they are this share of it and answers may still grow
# by this many tokens; below that, restarting `generate` costs as much as it saves.
FINISHED_SHARE = 0.25
MIN_TOKENS_LEFT = 8

# Entries of a generation config that do not choose tokens: special tokens, lengths (given by the
# caller), the cache, and what is returned.
NOT_DECODING = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "max_length",
    "max_new_tokens",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "compile_config",
    "disable_compile",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "transformers_version",
)
# Values of the others that change nothing; files have them too.
NEUTRAL = {
    "do_sample": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "early_stopping": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "token_healing": False,
    "is_assistant": False,
    "assistant_early_exit": 0,
}
LONGEST_VALUE = 60  # characters of a setting's value in a warning


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
    stops = end_tokens(network) if stop_ids is None else list(stop_ids)
    pad_id = _pad_token(network, stops)
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
        with decoding_greedily(network, stops, pad_id) as config:
            while True:
                width = ids.shape[1]
                config.max_new_tokens = max_new_tokens - done
                criteria = [] if in_step else [_ManyFinished(stops_S, width, config.max_new_tokens)]
                reply = _generate(network, ids, mask, cache, criteria, in_step)
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


def _generate(
    network: Any, ids: Tensor, mask: Tensor, cache: Any, criteria: list[Any], in_step: bool
) -> Any:
    """Continue a batch as its generation config says; returns the sequences and the cache."""
    with contiguous_head_inputs(network):
        return network.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            stopping_criteria=criteria,
            synced_gpus=in_step,
        )


@contextmanager
def decoding_greedily(
    network: Any, stops: Sequence[int], pad_id: int | None
) -> Iterator[GenerationConfig]:
    """Replace a network's generation config by a plain greedy one inside a ``with`` block.

    A repetition penalty, beams, a least length, banned or forced tokens and the like would be
    applied to greedy decoding too. Settings that are set aside are named in a warning, once.

    Args:
        network: A causal LM, or PEFT's wrapper around one.
        stops: Tokens that end an answer.
        pad_id: Token that follows a finished answer.

    Yields:
        The config in use; the longest answer is its ``max_new_tokens``.
    """
    inner = network.get_base_model() if hasattr(network, "get_base_model") else network
    own = inner.generation_config
    if ignored := set_aside(own):
        _warn_once(str(getattr(network, "name_or_path", "")), ", ".join(ignored))
    inner.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        use_cache=True,
        return_dict_in_generate=True,
        bos_token_id=own.bos_token_id,
        eos_token_id=list(stops) or None,
        pad_token_id=pad_id,
    )
    try:
        yield inner.generation_config
    finally:
        inner.generation_config = own


def set_aside(config: GenerationConfig) -> list[str]:
    """Settings of a generation config, as ``name=value``, that greedy decoding does not use."""
    return [
        f"{name}={_shorten(str(value))}"
        for name, value in config.to_dict().items()
        if value is not None
        and not name.startswith("_")
        and name not in NOT_DECODING
        and value != NEUTRAL.get(name)
    ]


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]} ..."


@cache
def _warn_once(path: str, settings: str) -> None:
    """Warn of settings that are set aside, once in a process for a model."""
    warnings.warn(
        f"greedy answers: these settings of the generation config of {path or 'the model'} are set"
        f" aside: {settings}",
        stacklevel=3,
    )


def _pad_token(network: Any, stops: Sequence[int]) -> int:
    """The pad token of the generation config, or else a stop token."""
    pad = network.generation_config.pad_token_id
    return stops[0] if pad is None else int(pad)


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
