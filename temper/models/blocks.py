"""The parts of a decoder that objectives look into: its layers, their attention and their MLP
blocks.

Found by structure, so that Llama, Mistral, Gemma, Qwen, Phi, GPT-2, GPT-NeoX, Falcon, Bloom and MPT
need no table of their names: the layers are the one list of modules that all hold an attention
block.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from temper.errors import TemperError
from temper.models.folder import FLAG

ATTENTION = ("attn", "attention")  # self_attn, attn, attention, self_attention, linear_attn
MLP = ("mlp", "ffn", "feed_forward", "block_sparse_moe")
NOT_A_BLOCK = ("norm", "dropout", "ln_")  # post_attention_layernorm, resid_attn_dropout


def decoder_layers(network: nn.Module) -> list[nn.Module]:
    """Decoder layers of a causal LM of transformers, or of PEFT's wrapper around one, first to
    last.

    Raises:
        TemperError: not exactly one list of modules holds an attention block in each of them.
    """
    lm: Any = network
    if hasattr(lm, "get_base_model"):
        lm = lm.get_base_model()
    lists = [module for module in lm.modules() if isinstance(module, nn.ModuleList) and len(module)]
    found = [layers for layers in lists if all(_children(layer, ATTENTION) for layer in layers)]
    if len(found) != 1:
        raise TemperError(
            f"model.init_args.network: {type(lm).__name__} has {len(found)} lists of layers with"
            " attention blocks, and this objective looks into the one list of a decoder-only"
            " causal LM; use a model such as Llama, Gemma, Qwen or GPT-2"
        )
    return list(found[0])


def attention_blocks(network: nn.Module) -> list[nn.Module]:
    """The attention block of every decoder layer. Its output, or the first of its outputs, is
    ``B x T x D``.

    Raises:
        TemperError: as `decoder_layers`; or a layer has several.
    """
    return [_only(layer, ATTENTION, "attention") for layer in decoder_layers(network)]


def mlp_blocks(network: nn.Module) -> list[nn.Module]:
    """The MLP block of every decoder layer: of a mixture of experts, the whole mixture.

    Raises:
        TemperError: as `decoder_layers`; or a layer has none, or several.
    """
    return [_only(layer, MLP, "MLP") for layer in decoder_layers(network)]


def _children(layer: nn.Module, words: tuple[str, ...]) -> list[nn.Module]:
    return [
        child
        for name, child in layer.named_children()
        if any(word in name for word in words) and not any(word in name for word in NOT_A_BLOCK)
    ]


def _only(layer: nn.Module, words: tuple[str, ...], what: str) -> nn.Module:
    found = _children(layer, words)
    if len(found) != 1:
        names = ", ".join(name for name, _ in layer.named_children())
        raise TemperError(
            f"model.init_args.network: {type(layer).__name__} has {len(found)} {what} blocks among"
            f" its parts ({names}), and this objective needs exactly one in every layer; use a"
            " model such as Llama, Gemma, Qwen or GPT-2"
        )
    return found[0]


# MERGED from temper.models.blocks: How a network computes: what it keeps for the backward pass, and
# whether it is compiled.


def checkpoint_activations(network: nn.Module) -> None:
    """Keep the inputs of decoder layers only, and compute the rest again in the backward pass.

    Raises:
        TemperError: transformers has no activation checkpointing for this architecture.
    """
    if not getattr(network, "supports_gradient_checkpointing", False):
        raise TemperError(
            f"{FLAG}.activation_checkpointing=true: {type(network).__name__} has none; set it to"
            " false"
        )
    # Not re-entrant: the other kind loses the gradient of adapters inside a layer whose input has
    # none.
    network.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]


def compile_layers(network: nn.Module) -> None:
    """Compile every decoder layer in place: names of weights stay what they were."""
    # Objectives hook into layers, and a compiled layer would not notice a hook that came after it
    # was compiled.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    for layer in decoder_layers(network):
        layer.compile()


# MERGED from temper.models.blocks: How many weights there are, wherever and however they are held.


def count_weights(parameters: Iterable[nn.Parameter]) -> int:
    """Weights in parameters; of those that DeepSpeed has cut over ranks (ZeRO-3) and those packed
    two to a byte (4 bits), all.
    """
    return sum(map(_size, parameters))


def _size(parameter: nn.Parameter) -> int:
    packed = getattr(parameter, "quant_state", None)  # bitsandbytes
    if packed is not None:
        return math.prod(packed.shape)
    return int(getattr(parameter, "ds_numel", parameter.numel()))
