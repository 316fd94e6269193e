"""LoRA adapters through PEFT: adding, loading, switching off, saving and merging; and dropout.

A network has one adapter, named `FIRST`. With ``adapter=new`` it has two: the loaded one (`FIRST`)
is frozen, and only `SECOND` is trained.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from temper.errors import TemperError
from temper.models.folder import FLAG, LoRASpec, NetworkSpec, first_line
from temper.models.quantize import dequantize, is_quantized
from temper.models.weight_files import ADAPTER_WEIGHTS, AGAIN, check_finite

# Names of the adapters in PEFT, and so in state dicts and checkpoints.
FIRST = "default"
SECOND = "next"

# -- adding, loading, switching off


def is_adapted(network: nn.Module) -> bool:
    """Whether a network has adapters."""
    return hasattr(network, "peft_config")


def add_lora(network: nn.Module, lora: LoRASpec, revision: str | None = None) -> nn.Module:
    """Freeze a network and add a trainable adapter.

    If the network already has an adapter, that is frozen too, and both are active.

    Args:
        network: A transformers model, or a PEFT model around one.
        lora: The new adapter.
        revision: Revision of the base model on the hub, stored in the adapter's config.

    Raises:
        TemperError: no linear layer has one of the target names.
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
    network.add_adapter(SECOND, config)
    network.base_model.set_adapter([FIRST, SECOND])  # type: ignore[operator]
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(f".{SECOND}." in name)
    return network


def load_adapter(network: nn.Module, folder: Path, spec: NetworkSpec) -> nn.Module:
    """Load the adapter of a folder onto its base model, as ``spec.adapter`` says.

    Returns:
        ``continue``: the network with the adapter, trainable. ``merge``: a plain network with the
        adapter merged into its weights, all trainable. ``new``: the network with the adapter
        frozen, for `add_lora`.

    Raises:
        TemperError: ``new``, and the adapter is more than a plain LoRA adapter; or as
            `attach_adapter`.
    """
    where = f"{FLAG}.path={spec.path}"
    adapted: Any = attach_adapter(network, folder, where, trainable=spec.adapter == "continue")
    if spec.adapter == "new" and (extra := _find_extra(adapted.peft_config[FIRST])):
        raise TemperError(
            f"{FLAG}.adapter=new: the adapter in path={spec.path} has {extra}, which cannot be"
            " combined with another; use merge"
        )
    if spec.adapter != "merge":
        plain: nn.Module = adapted
        return plain
    merged: nn.Module = adapted.merge_and_unload()
    # The merged weights are in no folder, so an adapter-only export must not name one.
    merged.name_or_path = ""  # type: ignore[assignment]
    merged.config._name_or_path = ""  # type: ignore[union-attr]
    return merged.requires_grad_(True)  # PEFT had frozen the base model


def attach_adapter(
    network: nn.Module, folder: Path, where: str, trainable: bool = False
) -> nn.Module:
    """Put the adapter of a folder on its base model, whole.

    Args:
        network: The base model.
        folder: Folder of the adapter, with safetensors.
        where: Flag and folder, for errors.
        trainable: Whether its weights are trained further.

    Returns:
        The PEFT model.

    Raises:
        TemperError: the adapter is of another network: weights of it are missing, left over or of
            another shape, or no layer has a name that its config targets; or they are not finite.
    """
    from peft import PeftModel
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
            adapted = PeftModel.from_pretrained(network, folder, is_trainable=trainable)
        stored = load_peft_weights(str(folder), device="cpu")
        # from_pretrained does not return what it could not place.
        placed: Any = set_peft_model_state_dict(adapted, stored, adapter_name=FIRST)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = f"lacks {error}" if isinstance(error, KeyError) else _size_mismatch(error)
        raise TemperError(
            f"{where}: its adapter does not fit its base model: {reason}; {AGAIN}, or put the base"
            " model back that it was trained on (base_model_name_or_path in adapter_config.json)"
        ) from error
    missing = sorted(name for name in placed.missing_keys if f".{FIRST}" in name)
    for names, verb in ((missing, "lacks"), (sorted(placed.unexpected_keys), "holds, unused,")):
        if names:
            raise TemperError(
                f"{where}: its adapter {verb} {len(names)} weights ({names[0]}, ...), by its config"
                f" and this base model; {AGAIN}, or put the base model back that it was trained on"
                " (base_model_name_or_path in adapter_config.json)"
            )
    check_finite(stored.items(), where)
    return adapted


def _size_mismatch(error: Exception) -> str:
    """The line of an error that names a weight of another shape, or its first line."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if "size mismatch" in line), first_line(error)).rstrip(".")


def cast_trainable_to_fp32(network: nn.Module) -> nn.Module:
    """Cast trainable weights to float32 in place, whatever the precision of the frozen ones.

    A step of Adam or of Booster is below the resolution of bfloat16.
    """
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return network


@contextmanager
def disable_trained_adapter(network: nn.Module) -> Iterator[None]:
    """Switch the trained adapter off inside a ``with`` block; a frozen adapter stays on.

    The network then computes as it did before training.
    """
    peft: Any = network
    if SECOND not in peft.peft_config:
        with peft.disable_adapter():
            yield
        return
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        peft.base_model.set_adapter(FIRST, inference_mode=True)
        yield
    finally:
        peft.base_model.set_adapter([FIRST, SECOND], inference_mode=True)
        for parameter in trainable:
            parameter.requires_grad_(True)


def _check_targets(network: nn.Module, lora: LoRASpec) -> None:
    """Check that every target of a new adapter is the name of a linear layer."""
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    names |= {
        name.split(".")[-2] for name, _ in network.named_modules() if name.endswith(".base_layer")
    }
    names -= {"base_layer", FIRST, SECOND}
    unknown = set() if lora.targets == "all-linear" else set(lora.targets) - names
    if unknown:
        raise TemperError(
            f"{FLAG}.lora.targets: no linear layer is named {sorted(unknown)[0]!r}; choose from"
            f" {', '.join(sorted(names))}"
        )


def _find_extra(config: Any) -> str | None:
    """Name the first setting of an adapter that goes beyond plain LoRA: ``scale * B A``, one rank.

    Returns:
        None for a plain LoRA adapter.
    """
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


# -- dropout


def check_no_lora_dropout(spec: NetworkSpec) -> None:
    """Check that no dropout is set for a new adapter: `disable_dropout` would remove it.

    Raises:
        TemperError: ``lora.dropout`` is not 0.
    """
    if spec.lora is not None and spec.lora.dropout:
        raise TemperError(
            f"model.init_args.network.lora.dropout={spec.lora.dropout}: preference losses compare"
            " two models or two answers, and dropout would be a difference between them; set it"
            " to 0"
        )


def disable_dropout(network: nn.Module) -> None:
    """Set every dropout probability of a network to 0, permanently.

    A preference loss compares log-probabilities of two models, or of two answers, and dropout is
    noise in the difference. `nn.Module.eval` would switch off gradient checkpointing too. The
    network's config keeps its values, so an export has the dropout of the original.
    """
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Many modules call F.dropout with a probability of their own (attention_dropout, dropout,
        # hidden_dropout, attn_dropout_p, ...).
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


# -- saving adapters


def base_model_name(network: nn.Module) -> str:
    """Return the folder or hub name of a network's base model; empty if it is in no folder.

    An adapter-only export names it in adapter_config.json.
    """
    return str(getattr(network, "name_or_path", "") or "")


def save_adapter(network: nn.Module, folder: Path) -> None:
    """Save the network's adapter alone, in PEFT's format; two adapters are combined into one.

    Args:
        network: A PEFT model; it does not change.
        folder: An existing folder.

    Raises:
        TemperError: the base model is in no folder (random weights, or an adapter was merged into
            it), so the adapter could not be loaded.
    """
    if not base_model_name(network):
        raise TemperError(
            "HFExport.merge=false: the base of the adapter is in no folder (network.shape, or"
            " network.adapter=merge changed it); export merged, or use network.adapter=new, which"
            " keeps the existing adapter beside the trained one"
        )
    peft: Any = network
    if SECOND not in peft.peft_config:
        # With embedding layers, PEFT would look the base model up on the hub.
        peft.save_pretrained(folder, save_embedding_layers=False)
        return
    config, weights = combine_adapters(network)
    config.save_pretrained(folder)
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def combine_adapters(network: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """Combine both adapters of a network into one of rank ``r1 + r2``.

    ``s1 B1 A1 + s2 B2 A2 = [B1 B2] [s1 A1; s2 A2]``, with the scales s. PEFT's
    ``add_weighted_adapter`` (cat) computes the same, but would add a third adapter to the network
    in training.

    Returns:
        PEFT's config of the combined adapter, and its weights by their names in PEFT's files.
    """
    from peft.utils import get_peft_model_state_dict

    peft: Any = network
    configs = [peft.peft_config[name] for name in (FIRST, SECOND)]
    states = [
        get_peft_model_state_dict(peft, adapter_name=name, save_embedding_layers=False)
        for name in (FIRST, SECOND)
    ]
    rank = sum(config.r for config in configs)
    weights = {}
    for key in sorted({key for state in states for key in state}):
        is_a = "lora_A" in key or "lora_embedding_A" in key
        factors: list[Tensor | None] = []
        for config, state in zip(configs, states, strict=True):
            factor = state.get(key)
            if factor is not None and is_a:
                factor = factor * _scale(config)
            factors.append(factor)
        filled = _fill_missing(factors, configs, is_a)
        weights[key] = torch.cat(filled, 0 if is_a else 1).contiguous()
    combined = replace(
        configs[0],
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        target_modules=set().union(*(config.target_modules for config in configs)),
        inference_mode=True,
    )
    return combined, weights


def _scale(config: Any) -> float:
    """Factor of ``B A``: alpha / r, or alpha / sqrt(r) with rank-stabilized LoRA."""
    return float(config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r))


def _fill_missing(factors: list[Tensor | None], configs: list[Any], is_a: bool) -> list[Tensor]:
    """Replace the factor of an adapter that leaves a layer out by zeros of its rank."""
    present = next(factor for factor in factors if factor is not None)
    shapes = [
        (config.r, present.shape[1]) if is_a else (present.shape[0], config.r) for config in configs
    ]
    return [
        present.new_zeros(shape) if factor is None else factor
        for factor, shape in zip(factors, shapes, strict=True)
    ]


# -- merging


def merged_copy(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a plain network with the adapters merged into its weights, as a copy.

    A quantized base is dequantized first, to the weights that training computed with. The network
    in training does not change. A network without adapters is returned itself, not copied.

    Args:
        network: A PEFT model, or any other.
        dtype: Precision to merge in and to return; None: that of the base model, to which the sum
            is rounded (`merge_cosine` measures the effect).
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
    # PEFT's own merge into a quantized base would quantize the sum again.
    for name, config in network.peft_config.items():
        adapted = get_peft_model(plain, copy.deepcopy(config))
        set_peft_model_state_dict(
            adapted,
            get_peft_model_state_dict(network, adapter_name=name, save_embedding_layers=False),
        )
        plain = adapted.merge_and_unload()
    return plain


@torch.no_grad()
def merge_cosine(network: nn.Module, merged: nn.Module) -> float:
    """Return the cosine between the adapters' weight change and the change that a merge made.

    It is below 1 if merging rounded: half a step of bfloat16 is 0.2 to 0.4 % of a weight, and
    adapters change most weights by less.

    Args:
        network: A PEFT model whose base is not quantized.
        merged: Its `merged_copy`.
    """
    delta_norm2 = 0.0
    change_norm2 = 0.0
    product = 0.0
    peft: Any = network
    for name, layer in peft.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight"):
            delta = sum(
                layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters
            )
            change = (
                merged.get_submodule(name).weight.float() - layer.get_base_layer().weight.float()
            )
            delta_norm2 += float(delta.square().sum())
            change_norm2 += float(change.square().sum())
            product += float((delta * change).sum())
    if not delta_norm2:
        return 1.0
    return float(product / max((delta_norm2 * change_norm2) ** 0.5, 1e-30))
