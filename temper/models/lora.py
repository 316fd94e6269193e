"""LoRA adapters put on a network, through PEFT: a new one, a found one, or both.

A network has one adapter, `FOUND`; under the policy ``new`` it has two, and only `NEW` is trained.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from temper.errors import TemperError
from temper.models.folder import FLAG, LoRASpec, NetworkSpec
from temper.models.quantize import dequantize, is_quantized

FOUND, NEW = "default", "next"


def is_adapted(network: nn.Module) -> bool:
    """Whether a network has adapters."""
    return hasattr(network, "peft_config")


def add_lora(network: nn.Module, lora: LoRASpec, revision: str | None = None) -> nn.Module:
    """Freeze a network and train a new adapter on it; on a network with an adapter, freeze that too
    and use both.

    Args:
        network: A transformers model, or a PEFT model around one.
        lora: The new adapter.
        revision: Of the hub model that the network is, for who loads the adapter alone.

    Raises:
        TemperError: no layer has a name that is asked for.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    _check_targets(network, lora)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.targets,
        lora_dropout=lora.dropout,
        task_type="CAUSAL_LM",
        revision=revision,
    )
    if not isinstance(network, PeftModel):
        return get_peft_model(network, config)
    network.add_adapter(NEW, config)
    network.base_model.set_adapter([FOUND, NEW])  # type: ignore[operator]
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(f".{NEW}." in name)
    return network


def load_adapter(network: nn.Module, folder: Path, spec: NetworkSpec) -> nn.Module:
    """Put the adapter of a folder on its base, as the policy of the spec says.

    Returns:
        ``continue``: with the adapter, which is trained. ``merge``: a plain network with the
        adapter in its weights, all of which are trained. ``new``: with the adapter, frozen, for
        `add_lora`.

    Raises:
        TemperError: ``new`` beside something that is more than a plain LoRA adapter.
    """
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(network, folder, is_trainable=spec.adapter == "continue")
    if spec.adapter == "new" and (more := _more_than_lora(adapted.peft_config[FOUND])):
        raise TemperError(
            f"{FLAG}.adapter=new: the adapter in path={spec.path} has {more}, which cannot be"
            " combined with another; use merge"
        )
    if spec.adapter != "merge":
        return adapted
    merged: nn.Module = adapted.merge_and_unload()
    merged.name_or_path = merged.config._name_or_path = ""  # type: ignore[assignment,union-attr]  # it is in no folder any more
    return merged.requires_grad_(True)  # PEFT froze it around the adapter


def cast_trainable_to_fp32(network: nn.Module) -> nn.Module:
    """Adapters in fp32, whatever the base is in: a step of Adam or of Booster is below the
    resolution of bfloat16.
    """
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return network


@contextmanager
def disable_trained_adapter(network: nn.Module) -> Iterator[None]:
    """While it lasts, the network is what training starts from: its trained adapter is off, a
    frozen one stays on.
    """
    peft: Any = network
    if NEW not in peft.peft_config:
        with peft.disable_adapter():
            yield
        return
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        peft.base_model.set_adapter(FOUND, inference_mode=True)
        yield
    finally:
        peft.base_model.set_adapter([FOUND, NEW], inference_mode=True)
        for parameter in learning:
            parameter.requires_grad_(True)


def _check_targets(network: nn.Module, lora: LoRASpec) -> None:
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    names |= {
        name.split(".")[-2] for name, _ in network.named_modules() if name.endswith(".base_layer")
    }
    names -= {"base_layer", FOUND, NEW}
    unknown = set() if lora.targets == "all-linear" else set(lora.targets) - names
    if unknown:
        raise TemperError(
            f"{FLAG}.lora.targets: no linear layer is named {sorted(unknown)[0]!r}; choose from"
            f" {', '.join(sorted(names))}"
        )


def _more_than_lora(config: Any) -> str | None:
    """What an adapter has beside ``scale * B A`` of one rank, in words."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return f"the type {kind}"
    extras = (
        "use_dora",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "lora_bias",
        "trainable_token_indices",
        "layer_replication",
    )
    return next(
        (name for name in extras if getattr(config, name, None)),
        "bias" if config.bias != "none" else None,
    )


# MERGED from temper.models.lora: Networks without dropout.


def check_no_lora_dropout(spec: NetworkSpec) -> None:
    """Refuse dropout that a user asked for and that `disable_dropout` would take away.

    Raises:
        TemperError: a new adapter with dropout.
    """
    if spec.lora is not None and spec.lora.dropout:
        raise TemperError(
            f"model.init_args.network.lora.dropout={spec.lora.dropout}: preference losses compare"
            " two models or two answers, and dropout would be a difference between them; set it"
            " to 0"
        )


def disable_dropout(network: nn.Module) -> None:
    """Set every dropout of a network to 0, for good.

    A preference loss compares log-probabilities of two models, or of two answers, and dropout is
    noise in the difference. Not `nn.Module.eval`, which would switch off gradient checkpointing
    too. The network's config keeps its values, so that an export is as it was.
    """
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Many have plain numbers (attention_dropout, dropout, hidden_dropout, attn_dropout_p, ...)
        # and call the function.
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


# MERGED from temper.models.lora: Adapters taken out of a network: written alone, or merged into its
# weights.


WEIGHTS = "adapter_model.safetensors"


def base_model_name(network: nn.Module) -> str:
    """The folder or hub name that an adapter-only export tells its readers to put it on; empty if
    the base is in none.
    """
    return str(getattr(network, "name_or_path", "") or "")


def save_adapter(network: nn.Module, folder: Path) -> None:
    """Write the network's adapter, and nothing else, as PEFT loads it; two adapters become one that
    does the same.

    Args:
        network: A PEFT model, which is left as it is.
        folder: Exists.

    Raises:
        TemperError: the base is in no folder (random weights, or an adapter was merged into it):
            nobody could use the adapter.
    """
    if not base_model_name(network):
        raise TemperError(
            "HFExport.merge=false: the base of the adapter is in no folder (network.shape, or"
            " network.adapter=merge changed it); export merged, or use network.adapter=new, which"
            " keeps the adapter that was found beside the one that is trained"
        )
    peft: Any = network
    if NEW not in peft.peft_config:
        peft.save_pretrained(
            folder, save_embedding_layers=False
        )  # else the hub is asked about the base
        return
    config, weights = combine_adapters(network)
    config.save_pretrained(folder)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def combine_adapters(network: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """Both adapters of a network as one: ``s1 B1 A1 + s2 B2 A2 = [B1 B2] [s1 A1; s2 A2]``, of rank
    ``r1 + r2``.

    PEFT's ``add_weighted_adapter`` (cat) computes the same, but puts a third adapter into the
    network in training.

    Returns:
        PEFT's config of the one adapter, and its weights by the names that PEFT has for them on
        disk.
    """
    from peft.utils import get_peft_model_state_dict

    peft: Any = network
    configs = [peft.peft_config[name] for name in (FOUND, NEW)]
    states = [
        get_peft_model_state_dict(peft, adapter_name=name, save_embedding_layers=False)
        for name in (FOUND, NEW)
    ]
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
    return (
        replace(
            configs[0],
            r=rank,
            lora_alpha=rank,
            use_rslora=False,
            target_modules=targets,
            inference_mode=True,
        ),
        weights,
    )


def merged_copy(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A plain network without adapters that does the same; a network without adapters is given back
    as it is.

    A base in few bits becomes a dense one of the weights that those bits stand for: what training
    saw. The network in training is left as it is.

    Args:
        network: A PEFT model, or any other.
        dtype: What to add adapters to their base in, and to leave it in; None: the precision of the
            base, to which the sum is rounded (`merge_cosine` measures what that does).
    """
    from peft import PeftModel, get_peft_model
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    if not isinstance(network, PeftModel):
        return network
    copied: Any = copy.deepcopy(network)
    if not is_quantized(network):
        merged: nn.Module = copied.to(dtype).merge_and_unload()
        return merged
    plain = dequantize(copied.unload()).to(dtype)
    for (
        name,
        config,
    ) in (
        network.peft_config.items()
    ):  # one after the other: PEFT merges into few bits by rounding to them again
        adapted = get_peft_model(plain, copy.deepcopy(config))
        set_peft_model_state_dict(
            adapted,
            get_peft_model_state_dict(network, adapter_name=name, save_embedding_layers=False),
        )
        plain = adapted.merge_and_unload()
    return plain


@torch.no_grad()
def merge_cosine(network: nn.Module, merged: nn.Module) -> float:
    """Cosine between the change that adapters stand for and the change of the weights that they
    were merged into.

    Below 1 the sum was rounded: half a step of bfloat16 is 0.2 to 0.4 % of a weight, and adapters
    change most weights by less.

    Args:
        network: A PEFT model on a base that is not in few bits.
        merged: Its `merged_copy`.
    """
    intended = made = both = 0.0
    peft: Any = network
    for name, layer in peft.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight"):
            delta = sum(
                layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters
            )
            change = (
                merged.get_submodule(name).weight.float() - layer.get_base_layer().weight.float()
            )
            intended += float(delta.square().sum())
            made += float(change.square().sum())
            both += float((delta * change).sum())
    return both / max((intended * made) ** 0.5, 1e-30) if intended else 1.0


def _scale(config: Any) -> float:
    return float(config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r))


def _padded(parts: list[Tensor | None], configs: list[Any], down: bool) -> list[Tensor]:
    """Zeros where an adapter has nothing on a layer, so that every layer has the whole rank."""
    present = next(part for part in parts if part is not None)
    shapes = [
        (config.r, present.shape[1]) if down else (present.shape[0], config.r) for config in configs
    ]
    return [
        present.new_zeros(shape) if part is None else part
        for part, shape in zip(parts, shapes, strict=True)
    ]
