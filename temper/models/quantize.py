"""Quantized base models: 4-bit (nf4) and 8-bit (int8) frozen weights, through bitsandbytes."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from temper.errors import TemperError
from temper.models.folder import FLAG, NetworkSpec
from temper.packages import install_hint, is_installed

_SETTINGS: dict[str, Callable[[torch.dtype], dict[str, Any]]] = {
    "nf4": lambda dtype: {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    },
    "int8": lambda dtype: {"load_in_8bit": True},
}


def quantization_settings(spec: NetworkSpec) -> dict[str, Any]:
    """Return the arguments of ``AutoModelForCausalLM.from_pretrained`` that quantize a network.

    Returns:
        Keyword arguments; empty without quantization.

    Raises:
        TemperError: bitsandbytes is not installed.
    """
    if spec.quantization is None:
        return {}
    check_bitsandbytes(spec.quantization)
    from transformers import BitsAndBytesConfig

    # bitsandbytes warns in every layer and every evaluation pass that LLM.int8 casts to float16.
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast_warning)

    settings = _SETTINGS[spec.quantization](getattr(torch, spec.dtype))
    return {"quantization_config": BitsAndBytesConfig(**settings)}  # type: ignore[no-untyped-call]


def _is_no_cast_warning(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in record.getMessage()


def check_bitsandbytes(quantization: str) -> None:
    """Check that bitsandbytes is installed.

    Raises:
        TemperError: it is not installed.
    """
    if not is_installed("bitsandbytes"):
        raise TemperError(f"{FLAG}.quantization={quantization}: {install_hint('bitsandbytes')}")


def is_quantized(network: nn.Module) -> bool:
    """Whether the weights of a network are quantized."""
    return getattr(getattr(network, "config", None), "quantization_config", None) is not None


def prepare_quantized(network: nn.Module) -> nn.Module:
    """Prepare a quantized network for training after evaluation, and for loading checkpoints.

    Returns:
        The same network.
    """
    for name, layer in network.named_modules():
        # On a CPU with AVX512-BF16, bitsandbytes repacks 4-bit weights when they are first used
        # without gradients, and the repacked weights have no backward pass: training after an
        # evaluation would continue with half of its gradient.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        weight = getattr(layer, "weight", None)
        is_4bit = hasattr(weight, "quant_state")
        is_8bit = hasattr(weight, "SCB")
        if is_4bit or is_8bit:
            layer.register_load_state_dict_pre_hook(_make_base_check(name))
    return network


def dequantize(network: nn.Module) -> nn.Module:
    """Dequantize a network in place, to plain weights in its own precision."""
    plain: nn.Module = network.dequantize()  # type: ignore[operator]
    plain.config.__dict__.pop("quantization_config", None)
    return plain


def _make_base_check(name: str) -> Callable[..., None]:
    """Return a hook that compares the quantization state in a checkpoint with the layer's own.

    The hook also removes the scales from the checkpoint's state dict, because bitsandbytes saves
    them but cannot load them.
    """

    def check_and_remove(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        own: dict[str, torch.Tensor] = {}
        layer._save_to_state_dict(own, "", False)
        for key, value in own.items():
            stored = (
                state.get(prefix + key, value)
                if key == "weight"
                else state.pop(prefix + key, value)
            )
            if not torch.equal(stored.to(value.device), value):
                raise TemperError(
                    f"ckpt_path: {name} of the checkpoint is of another model; give the"
                    " network.path that it was trained with"
                )

    return check_and_remove
