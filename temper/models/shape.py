"""Networks with random weights."""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from temper.errors import TemperError
from temper.models.folder import FLAG
from temper.models.spec import Attention, ShapeSpec


def from_shape(shape: ShapeSpec, tokenizer: PreTrainedTokenizerBase, attention: Attention | None = None) -> nn.Module:
    """A Llama of a shape, for the vocabulary of a tokenizer; its weights depend on the shape and its seed alone.

    Raises:
        TemperError: the heads do not divide the width.
    """
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = llama_config(shape, len(tokenizer), **ids)
    config._attn_implementation = attention
    # On the CPU, wherever training will be: a seed is one network, and no device's generator is touched.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(shape.seed)
        return LlamaForCausalLM(config)


def llama_config(shape: ShapeSpec, vocab_size: int, **special_ids: Any) -> LlamaConfig:
    """The architecture of a shape.

    Raises:
        TemperError: the heads do not divide the width.
    """
    if shape.hidden_size % shape.n_heads:
        raise TemperError(f"{FLAG}.shape: n_heads={shape.n_heads} does not divide hidden_size={shape.hidden_size}")
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        max_position_embeddings=shape.max_length,
        tie_word_embeddings=False,
        **special_ids,
    )
