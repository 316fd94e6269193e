"""Merging adapters into the weights of their base, and what rounding leaves of them."""

import copy
from typing import Any

import torch
from torch import nn

from temper.errors import TemperError
from temper.models.folder import first_line
from temper.models.quantize import dequantize, is_quantized


def merged_copy(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a plain network with the adapters merged into its weights, as a copy.

    A quantized base is dequantized first, to the weights that training computed with. An output
    layer that shares its weights with the token embeddings gets its own where an adapter changes
    one of the two, and the config says so. The network in training does not change. A network
    without adapters is returned itself, not copied.

    Args:
        network: A PEFT model, or any other.
        dtype: Precision to merge in and to return; None: that of the base model, to which the sum
            is rounded.
    """
    from peft import PeftModel, get_peft_model
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    if not isinstance(network, PeftModel):
        return network
    copied: Any = copy.deepcopy(network)
    if not is_quantized(network):
        return merge(copied.to(dtype))
    plain = dequantize(copied.unload()).to(dtype)
    # PEFT's own merge into a quantized base would quantize the sum again.
    for name, config in network.peft_config.items():
        adapted = get_peft_model(plain, copy.deepcopy(config))
        set_peft_model_state_dict(
            adapted,
            get_peft_model_state_dict(network, adapter_name=name, save_embedding_layers=False),
        )
        plain = merge(adapted)
    return plain


class CannotMergeError(TemperError):
    """An adapter that cannot be merged, such as one with biases on layers that have none."""


def merge(adapted: Any) -> nn.Module:
    """Merge the active adapters of a PEFT model into its base, in place; return the base.

    Raises:
        CannotMergeError: PEFT cannot merge an adapter of this kind.
    """
    _untie_adapted(adapted.get_base_model())
    try:
        merged: nn.Module = adapted.merge_and_unload()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        raise CannotMergeError(
            f"this adapter cannot be merged: {first_line(error)}; continue it (adapter=continue),"
            " and export it alone (merge=false)"
        ) from error
    _record_untied(merged)
    return merged


def _untie_adapted(base: Any) -> None:
    """Give output layer and token embeddings weights of their own if an adapter is on one of them:
    merged into shared weights, it would change the other too.
    """
    head = base.get_output_embeddings()
    embedding = base.get_input_embeddings()
    if head is None or not (_is_wrapped(head) or _is_wrapped(embedding)):
        return
    inner = _unwrap(head)
    shared = inner.weight
    if shared is _unwrap(embedding).weight:
        inner.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)


def _record_untied(network: Any) -> None:
    """Make config and bookkeeping say that output layer and embeddings are two, if they are."""
    head = network.get_output_embeddings()
    if head is None or head.weight is network.get_input_embeddings().weight:
        return
    for config in (network.config, network.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    weights = dict(network.named_parameters(remove_duplicate=False))
    network.all_tied_weights_keys = {
        name: other
        for name, other in getattr(network, "all_tied_weights_keys", {}).items()
        if weights.get(name) is weights.get(other)
    }


def _is_wrapped(layer: Any) -> bool:
    """Whether PEFT has put a layer of its own around a layer."""
    return hasattr(layer, "base_layer") or hasattr(layer, "original_module")


def _unwrap(layer: Any) -> Any:
    """The layer of the base model inside PEFT's."""
    while _is_wrapped(layer):
        layer = layer.base_layer if hasattr(layer, "base_layer") else layer.original_module
    return layer
