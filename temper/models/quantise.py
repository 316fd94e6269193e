"""Frozen bases in 4 or 8 bits, through bitsandbytes."""

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


def quantisation_settings(spec: NetworkSpec) -> dict[str, Any]:
    """What `transformers.AutoModelForCausalLM.from_pretrained` must be told to quantise as a spec
    says; empty for none.

    Raises:
        TemperError: bitsandbytes is not installed.
    """
    if spec.quantization is None:
        return {}
    check_bitsandbytes(spec.quantization)
    from transformers import BitsAndBytesConfig

    # Said for every layer and pass that evaluates: LLM.int8 multiplies in float16 whatever comes
    # in.
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_says_something)

    settings = _SETTINGS[spec.quantization](getattr(torch, spec.dtype))
    return {"quantization_config": BitsAndBytesConfig(**settings)}  # type: ignore[no-untyped-call]


def _says_something(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in record.getMessage()


def check_bitsandbytes(quantization: str) -> None:
    """Refuse to go on without bitsandbytes.

    Raises:
        TemperError: it is not installed.
    """
    if not is_installed("bitsandbytes"):
        raise TemperError(f"{FLAG}.quantization={quantization}: {install_hint('bitsandbytes')}")


def is_quantised(network: nn.Module) -> bool:
    """Whether the weights of a network are held in few bits."""
    return getattr(getattr(network, "config", None), "quantization_config", None) is not None


def prepare_quantised(network: nn.Module) -> nn.Module:
    """Make a network of few bits fit for training, evaluating and training again, and for
    checkpoints.
    """
    for name, layer in network.named_modules():
        # On a CPU with AVX512-BF16, bitsandbytes packs 4-bit weights anew when they are first used
        # without gradients, and what is packed so has no backward pass: training after an
        # evaluation would go on with half of its gradient.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        weight = getattr(layer, "weight", None)
        if hasattr(weight, "quant_state") or hasattr(
            weight, "SCB"
        ):  # bitsandbytes' parameters of 4 and of 8 bits
            layer.register_load_state_dict_pre_hook(_same_base(name))
    return network


def dequantised(network: nn.Module) -> nn.Module:
    """The network with plain weights in its own precision, in place: those that its few bits stand
    for.
    """
    plain: nn.Module = network.dequantize()  # type: ignore[operator]
    plain.config.__dict__.pop("quantization_config", None)
    return plain


def _same_base(name: str) -> Callable[..., None]:
    """A hook that takes the scales of a frozen layer out of what is loaded: bitsandbytes writes
    them and cannot read them back.
    """

    def take_out(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
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
                    " network.path that it was made with"
                )

    return take_out
