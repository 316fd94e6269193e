"""Adapters taken out of a network: written alone, or merged into its weights."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from temper.errors import TemperError
from temper.models.lora import FOUND, NEW
from temper.models.quantise import dequantised, is_quantised

WEIGHTS = "adapter_model.safetensors"


def named_base(network: nn.Module) -> str:
    """The folder or hub name that an adapter-only export tells its readers to put it on; empty if the base is in none."""
    return str(getattr(network, "name_or_path", "") or "")


def save_adapter(network: nn.Module, folder: Path) -> None:
    """Write the network's adapter, and nothing else, as PEFT loads it; two adapters become one that does the same.

    Args:
        network: A PEFT model, which is left as it is.
        folder: Exists.

    Raises:
        TemperError: the base is in no folder (random weights, or an adapter was merged into it): nobody could use the adapter.
    """
    if not named_base(network):
        raise TemperError(
            "HFExport.merge=false: the base of the adapter is in no folder (network.shape, or network.adapter=merge changed it); export "
            "merged, or use network.adapter=new, which keeps the adapter that was found beside the one that is trained"
        )
    peft: Any = network
    if NEW not in peft.peft_config:
        peft.save_pretrained(folder, save_embedding_layers=False)  # else the hub is asked about the base
        return
    config, weights = combined_adapter(network)
    config.save_pretrained(folder)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def combined_adapter(network: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """Both adapters of a network as one: ``s1 B1 A1 + s2 B2 A2 = [B1 B2] [s1 A1; s2 A2]``, of rank ``r1 + r2``.

    PEFT's ``add_weighted_adapter`` (cat) computes the same, but puts a third adapter into the network in training.

    Returns:
        PEFT's config of the one adapter, and its weights by the names that PEFT has for them on disk.
    """
    from peft.utils import get_peft_model_state_dict

    peft: Any = network
    configs = [peft.peft_config[name] for name in (FOUND, NEW)]
    states = [get_peft_model_state_dict(peft, adapter_name=name, save_embedding_layers=False) for name in (FOUND, NEW)]
    rank = sum(config.r for config in configs)
    weights = {}
    for key in sorted({key for state in states for key in state}):
        down = "lora_A" in key or "lora_embedding_A" in key
        parts = [
            (state[key] * _scale(config) if down else state[key]) if key in state else None
            for config, state in zip(configs, states, strict=True)
        ]
        weights[key] = torch.cat(_padded(parts, configs, down), 0 if down else 1).contiguous()
    targets = set().union(*(config.target_modules for config in configs))
    return replace(configs[0], r=rank, lora_alpha=rank, use_rslora=False, target_modules=targets, inference_mode=True), weights


def merged_copy(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A plain network without adapters that does the same; a network without adapters is given back as it is.

    A base in few bits becomes a dense one of the weights that those bits stand for: what training saw. The network
    in training is left as it is.

    Args:
        network: A PEFT model, or any other.
        dtype: What to add adapters to their base in, and to leave it in; None: the precision of the base, to which the sum is
            rounded (`merge_cosine` measures what that does).
    """
    from peft import PeftModel, get_peft_model
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    if not isinstance(network, PeftModel):
        return network
    copied: Any = copy.deepcopy(network)
    if not is_quantised(network):
        merged: nn.Module = copied.to(dtype).merge_and_unload()
        return merged
    plain = dequantised(copied.unload()).to(dtype)
    for name, config in network.peft_config.items():  # one after the other: PEFT merges into few bits by rounding to them again
        adapted = get_peft_model(plain, copy.deepcopy(config))
        set_peft_model_state_dict(adapted, get_peft_model_state_dict(network, adapter_name=name, save_embedding_layers=False))
        plain = adapted.merge_and_unload()
    return plain


@torch.no_grad()
def merge_cosine(network: nn.Module, merged: nn.Module) -> float:
    """Cosine between the change that adapters stand for and the change of the weights that they were merged into.

    Below 1 the sum was rounded: half a step of bfloat16 is 0.2 to 0.4 % of a weight, and adapters change most weights by less.

    Args:
        network: A PEFT model on a base that is not in few bits.
        merged: Its `merged_copy`.
    """
    intended = made = both = 0.0
    peft: Any = network
    for name, layer in peft.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight"):
            delta = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
            change = merged.get_submodule(name).weight.float() - layer.get_base_layer().weight.float()
            intended += float(delta.square().sum())
            made += float(change.square().sum())
            both += float((delta * change).sum())
    return both / max((intended * made) ** 0.5, 1e-30) if intended else 1.0


def _scale(config: Any) -> float:
    return float(config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r))


def _padded(parts: list[Tensor | None], configs: list[Any], down: bool) -> list[Tensor]:
    """Zeros where an adapter has nothing on a layer, so that every layer has the whole rank."""
    present = next(part for part in parts if part is not None)
    shapes = [(config.r, present.shape[1]) if down else (present.shape[0], config.r) for config in configs]
    return [present.new_zeros(shape) if part is None else part for part, shape in zip(parts, shapes, strict=True)]
