"""LoRA adapters through PEFT: adding, loading, switching off and saving; and dropout.

A network has one adapter, named `FIRST`. With ``adapter=new`` it has two: the loaded one (`FIRST`)
is frozen, and only `SECOND` is trained.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from temper.errors import TemperError
from temper.models.folder import FLAG, LoRASpec, NetworkSpec, first_line, read_json
from temper.models.merge import merge
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
    with _quiet_about_ties():
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
        TemperError: ``new``, and the adapter is more than a plain LoRA adapter; it holds whole
            embedding layers, and is not merged; or as `attach_adapter`.
    """
    _check_embeddings(network, folder, spec)
    where = f"{FLAG}.path={spec.path}"
    adapted: Any = attach_adapter(network, folder, where, trainable=spec.adapter == "continue")
    if spec.adapter == "new" and (extra := _find_extra(adapted.peft_config[FIRST])):
        raise TemperError(
            f"{FLAG}.adapter=new: the adapter in path={spec.path} has {extra}, which cannot be"
            " combined with another; use merge"
        )
    if spec.adapter != "merge":
        kept: nn.Module = adapted
        return kept
    merged: Any = merge(adapted)
    # The merged weights are in no folder, so an adapter-only export must not name one.
    merged.name_or_path = ""
    merged.config._name_or_path = ""
    trainable: nn.Module = merged.requires_grad_(True)  # PEFT had frozen the base model
    return trainable


def _check_embeddings(network: Any, folder: Path, spec: NetworkSpec) -> None:
    """Refuse an adapter file that replaces whole embedding layers, where they would be lost.

    PEFT stores them beside an adapter that was trained on resized embeddings. They are part of the
    base, so an adapter saved later would lack them.

    Raises:
        TemperError: their number is not that of the base; or ``adapter`` is not ``merge``.
    """
    weights = folder / ADAPTER_WEIGHTS
    kept = read_json(folder / "adapter_config.json").get("modules_to_save") or []
    layers = {
        name: layer
        for name, layer in network.named_modules()
        if layer in (network.get_input_embeddings(), network.get_output_embeddings())
        and name.rsplit(".", 1)[-1] not in kept
    }
    if not weights.exists():
        return  # PEFT's own error names the file
    with safe_open(weights, framework="pt") as file:
        stored = set(file.keys())
        for name, layer in layers.items():
            key = f"base_model.model.{name}.weight"
            if key not in stored:
                continue
            n_stored = file.get_slice(key).get_shape()[0]
            n_own = len(layer.weight)
            if n_stored != n_own:
                raise TemperError(
                    f"{FLAG}.path={spec.path}: this adapter was trained with {n_stored} rows in"
                    f" {name}, and its base has {n_own}; resize the base"
                    " (resize_token_embeddings), merge the adapter with peft and save the result"
                )
            if spec.adapter != "merge":
                raise TemperError(
                    f"{FLAG}.adapter={spec.adapter}: the adapter in path={spec.path} replaces the"
                    f" whole layer {name}, which an adapter saved later would lack; use merge"
                )


@contextmanager
def _quiet_about_ties() -> Iterator[None]:
    """Silence PEFT's advice on adapters of tied layers: merging unties them (`merge`)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*tie_word_embeddings=True.*")
        yield


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
        with warnings.catch_warnings(), _quiet_about_ties():
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
    weights = dict(adapted.named_parameters(remove_duplicate=False))
    # Tied layers share an adapter's weights, which are stored once.
    found = {id(weight) for name, weight in weights.items() if name not in placed.missing_keys}
    missing = sorted(
        name
        for name in placed.missing_keys
        if f".{FIRST}" in name and id(weights.get(name)) not in found
    )
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


# Settings of an adapter that do not make it more than ``scale * B A``.
PLAIN = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
)
PLAIN_STARTS = (True, False, "gaussian")  # the others change the base's weights


def _find_extra(config: Any) -> str | None:
    """Name the first setting of an adapter that goes beyond plain LoRA: ``scale * B A``, one rank.

    Returns:
        None for a plain LoRA adapter.
    """
    from peft import LoraConfig

    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return f"the type {kind}"
    if config.init_lora_weights not in PLAIN_STARTS:
        return f"init_lora_weights={config.init_lora_weights}"
    default = LoraConfig()
    for field in fields(default):
        value = getattr(config, field.name)
        same = value == getattr(default, field.name) or not (value or value == 0)
        if field.name not in (*PLAIN, "init_lora_weights") and not same:
            return field.name
    return None


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


def check_base_name(network: nn.Module) -> None:
    """Check that an adapter of this network can be loaded on its base.

    Raises:
        TemperError: the base model is in no folder (random weights, or an adapter was merged into
            it).
    """
    if not base_model_name(network):
        raise TemperError(
            "HFExport.merge=false: the base of the adapter is in no folder (network.shape, or"
            " network.adapter=merge changed it); export merged, or use network.adapter=new, which"
            " keeps the existing adapter beside the trained one"
        )


def save_adapter(network: nn.Module, folder: Path) -> None:
    """Save the network's adapter alone, in PEFT's format; two adapters are combined into one.

    Args:
        network: A PEFT model; it does not change.
        folder: An existing folder.
    """
    peft: Any = network
    if SECOND not in peft.peft_config:
        with _quiet_about_ties():
            # With embedding layers, PEFT would look the base model up on the hub.
            peft.save_pretrained(folder, save_embedding_layers=False)
    else:
        config, weights = combine_adapters(network)
        config.save_pretrained(folder)
        save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    # PEFT writes a README.md that names local folders.
    (folder / "README.md").unlink(missing_ok=True)


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
        target_modules=_combined_targets(configs, weights),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        inference_mode=True,
    )
    return combined, weights


def _combined_targets(configs: list[Any], weights: Mapping[str, Tensor]) -> set[str]:
    """Names of the layers of a combined adapter: as they were given, or in full where one of the
    adapters chooses layers in another way than by the ends of their names.
    """
    chosen = ("layers_to_transform", "layers_pattern", "exclude_modules")
    by_name = all(
        not isinstance(config.target_modules, str)
        and not any(getattr(config, name) for name in chosen)
        for config in configs
    )
    if by_name:
        return set().union(*(config.target_modules for config in configs))
    return {re.sub(r"^base_model\.model\.|\.lora_.*", "", key) for key in weights}


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
