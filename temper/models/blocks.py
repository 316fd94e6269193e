"""The blocks of a decoder (layers, attention, MLP), how they run, and how many weights they have.

Layers and blocks are found by structure, so Llama, Mistral, Gemma, Qwen, Phi, GPT-2, GPT-NeoX,
Falcon, Bloom and MPT need no table of their module names: the layers are the one `nn.ModuleList`
whose members all hold an attention block.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from temper.errors import TemperError
from temper.models.folder import FLAG

ATTENTION = ("attn", "attention")  # self_attn, attn, attention, self_attention, linear_attn
MLP = ("mlp", "ffn", "feed_forward", "block_sparse_moe")
NOT_A_BLOCK = ("norm", "dropout", "ln_")  # post_attention_layernorm, resid_attn_dropout

# -- finding blocks


def decoder_layers(network: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a causal LM, first to last.

    Args:
        network: A transformers causal LM, or PEFT's wrapper around one.

    Raises:
        TemperError: not exactly one `nn.ModuleList` has an attention block in each of its modules.
    """
    lm: Any = network
    if hasattr(lm, "get_base_model"):
        lm = lm.get_base_model()
    lists = [module for module in lm.modules() if isinstance(module, nn.ModuleList) and len(module)]
    found = [layers for layers in lists if all(_find_blocks(layer, ATTENTION) for layer in layers)]
    if len(found) != 1:
        raise TemperError(
            f"model.init_args.network: {type(lm).__name__} has {len(found)} lists of layers with"
            " attention blocks, and this objective needs the one list of a decoder-only causal LM;"
            " use a model such as Llama, Gemma, Qwen or GPT-2"
        )
    return list(found[0])


def attention_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the attention block of every decoder layer, first to last.

    The output of a block, or the first of its outputs, is ``B x T x D``.

    Raises:
        TemperError: as `decoder_layers`; or a layer has several attention blocks.
    """
    return [_find_one_block(layer, ATTENTION, "attention") for layer in decoder_layers(network)]


def mlp_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the MLP block of every decoder layer, first to last.

    In a mixture of experts, that is the whole mixture.

    Raises:
        TemperError: as `decoder_layers`; or a layer has no MLP block, or several.
    """
    return [_find_one_block(layer, MLP, "MLP") for layer in decoder_layers(network)]


def _find_blocks(layer: nn.Module, name_parts: tuple[str, ...]) -> list[nn.Module]:
    """Children of a layer whose names contain one of ``name_parts``."""
    return [
        child
        for name, child in layer.named_children()
        if any(part in name for part in name_parts)
        and not any(part in name for part in NOT_A_BLOCK)
    ]


def _find_one_block(layer: nn.Module, name_parts: tuple[str, ...], kind: str) -> nn.Module:
    found = _find_blocks(layer, name_parts)
    if len(found) != 1:
        names = ", ".join(name for name, _ in layer.named_children())
        raise TemperError(
            f"model.init_args.network: {type(layer).__name__} has {len(found)} {kind} blocks among"
            f" its submodules ({names}), and this objective needs exactly one in every layer; use a"
            " model such as Llama, Gemma, Qwen or GPT-2"
        )
    return found[0]


# -- how layers run


def checkpoint_activations(network: nn.Module) -> None:
    """Turn on activation checkpointing: keep layer inputs, recompute the rest in backward.

    Raises:
        TemperError: transformers has no activation checkpointing for this architecture.
    """
    if not getattr(network, "supports_gradient_checkpointing", False):
        raise TemperError(
            f"{FLAG}.activation_checkpointing=true: {type(network).__name__} does not support it;"
            " set it to false"
        )
    # Not reentrant: reentrant checkpointing loses the gradient of adapters inside a layer whose
    # input requires no gradient.
    network.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]


def refuse_reentrant() -> None:
    """Refuse to read outputs of blocks in a pass whose blocks run without gradient.

    Re-entrant checkpointing runs them so, and again in the backward pass, out of reach of a hook's
    caller. Called from hooks on blocks, which see in which mode these run.

    Raises:
        TemperError: gradients are off.
    """
    if not torch.is_grad_enabled():
        raise TemperError(
            f"{FLAG}: the network checkpoints its activations in the re-entrant way, which runs"
            " blocks without gradient, and this objective needs that of their outputs; switch it"
            f" off there, or set {FLAG}.activation_checkpointing=true, which is not re-entrant"
        )


def compile_layers(network: nn.Module) -> None:
    """Compile every decoder layer in place; parameter names do not change."""
    # Objectives register hooks on layers after compilation; without guards on hooks, a compiled
    # layer would ignore them.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    for layer in decoder_layers(network):
        layer.compile()


# -- weights

# What Hugging Face's trainers exempt from weight decay, by name (transformers 5).
UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def undecayed_weights(network: nn.Module) -> set[str]:
    """Return the names of the parameters that Hugging Face's trainers exempt from weight decay:
    those of layer norms, by class or by name, and biases.
    """
    in_norms = {
        f"{name}.{own}"
        for name, module in network.named_modules()
        if isinstance(module, nn.LayerNorm)
        for own, _ in module.named_parameters()
    }
    return {
        name
        for name, _ in network.named_parameters()
        if name in in_norms or UNDECAYED.search(name.lower())
    }


def count_weights(parameters: Iterable[nn.Parameter]) -> int:
    """Count the weights in parameters.

    Parameters that DeepSpeed ZeRO-3 has sharded count in full, and 4-bit weights, which are packed
    two to a byte, count each.
    """
    return sum(map(_count, parameters))


def _count(parameter: nn.Parameter) -> int:
    packed = getattr(parameter, "quant_state", None)  # bitsandbytes
    if packed is not None:
        return math.prod(packed.shape)
    return int(getattr(parameter, "ds_numel", parameter.numel()))
