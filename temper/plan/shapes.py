"""Shape of a network, without its weights: first its configuration, then its tensors and layers.

Everything that depends on the architecture is read from transformers' modules on the meta device.
"""

import contextlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers.pytorch_utils import Conv1D

from temper.errors import TemperError
from temper.models.blocks import attention_blocks, decoder_layers, mlp_blocks
from temper.models.folder import FLAG, LoRASpec, NetworkSpec, first_line, is_adapter, read_json
from temper.models.load import check_source, llama_config

# -- architectures: from the config, a folder, the hub's cache, published numbers or the hub

TABLE = "architectures.yaml"


@dataclass(frozen=True)
class Architecture:
    """Configuration of a network.

    Attributes:
        config: Configuration object of transformers.
        source: Where it came from, for messages.
        adapter: LoRA adapter in the folder, if it holds one.
    """

    config: Any
    source: str
    adapter: LoRASpec | None = None


def find_architecture(spec: NetworkSpec, vocabulary: int | None = None) -> Architecture:
    """Find the architecture of a network without reading its weights.

    Args:
        spec: Shape or path of the network.
        vocabulary: Vocabulary size of the data's tokenizer; needed for a shape.

    Raises:
        TemperError: neither or both of path and shape; a shape without vocabulary; a path whose
            config.json is not found.
    """
    check_source(spec)
    if spec.shape is not None:
        if vocabulary is None:
            raise TemperError(
                f"{FLAG}.shape: the size of the vocabulary is the tokenizer's; give"
                " data.init_args.tokenizer, or a datamodule that has one"
            )
        return Architecture(
            llama_config(spec.shape, vocabulary), f"{FLAG}.shape, vocabulary of the data"
        )
    folder = Path(str(spec.path))
    if is_adapter(folder):
        return _adapter_architecture(folder, spec)
    if (folder / "config.json").exists():
        config = _read_config(str(folder), spec, local=True)
        return Architecture(config, str(folder / "config.json"))
    return _named_architecture(str(spec.path), spec)


def _adapter_architecture(folder: Path, spec: NetworkSpec) -> Architecture:
    """Architecture of an adapter folder: its base model's, with the adapter."""
    config = read_json(folder / "adapter_config.json")
    targets: Any = config.get("target_modules") or []
    if targets != "all-linear":
        targets = [targets] if isinstance(targets, str) else list(targets)
    adapter = LoRASpec(int(config.get("r") or 0), int(config.get("lora_alpha") or 0), targets)
    base = find_architecture(
        NetworkSpec(
            path=str(config.get("base_model_name_or_path")), local_files_only=spec.local_files_only
        )
    )
    return Architecture(
        base.config,
        f"{base.source}, base of the adapter in {folder}",
        None if spec.adapter == "merge" else adapter,
    )


def _named_architecture(name: str, spec: NetworkSpec) -> Architecture:
    """Architecture of a model on the hub: from its cache, the published numbers, or the hub."""
    cached = _read_config(name, spec, local=True)
    if cached is not None:
        return Architecture(cached, f"the hub's cache ({name})")
    if name.rstrip("/") in _published():
        from transformers import AutoConfig

        numbers = dict(_published()[name.rstrip("/")])
        config = AutoConfig.for_model(numbers.pop("model_type"), **numbers)
        return Architecture(config, f"published numbers of {name} (temper/plan/{TABLE})")
    if not spec.local_files_only:
        return Architecture(_read_config(name, spec, local=False), f"the hub ({name})")
    raise TemperError(
        f"{FLAG}.path={name}: no config.json there, none in the hub's cache, and not one of the"
        f" models whose published numbers are known ({', '.join(sorted(_published()))}); give a"
        f" folder, or download its config.json: --{FLAG}.local_files_only=false"
    )


def _read_config(path: str, spec: NetworkSpec, local: bool) -> Any:
    """Read a config.json with transformers; None if it is not in the hub's cache."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            path,
            revision=spec.revision or "main",
            local_files_only=local,
            trust_remote_code=spec.trust_remote_code,
        )
        return config.get_text_config()
    except (OSError, ValueError, ImportError) as error:
        if local and not Path(path).is_dir():
            return None
        raise TemperError(
            f"{FLAG}.path={path}: its config.json cannot be read: {first_line(error)}; check the"
            " name and the connection"
        ) from error


@cache
def _published() -> dict[str, dict[str, Any]]:
    """Published configurations by model name."""
    entries = yaml.safe_load((files("temper.plan") / TABLE).read_text(encoding="utf-8"))
    return {
        name: {key: value for key, value in entry.items() if key != "names"}
        for entry in entries
        for name in entry["names"]
    }


# -- shapes: tensors and linear layers


@dataclass(frozen=True)
class Weight:
    """A weight tensor.

    Attributes:
        name: Name in the network.
        rows: Size of the first dimension, which FSDP2 shards.
        size: Number of elements.
        layer: Index of its decoder layer; None outside of the layers.
        quantized: Whether it is quantized if the base model is.
        adapter: Whether it belongs to an adapter.
    """

    name: str
    rows: int
    size: int
    layer: int | None = None
    quantized: bool = False
    adapter: bool = False


@dataclass(frozen=True)
class Linear:
    """A linear layer.

    Attributes:
        name: Name in the network.
        inputs: Input features.
        outputs: Output features.
        place: ``attention_in``, ``attention_out``, ``mlp_in``, ``mlp_out`` or ``head``.
        layer: Index of its decoder layer; None for the head.
    """

    name: str
    inputs: int
    outputs: int
    place: str
    layer: int | None = None


@dataclass(frozen=True)
class ModelShape:
    """Shape of a decoder-only language model.

    Attributes:
        name: Class and size, for titles.
        source: Where the shape came from.
        weights: All weights, without adapters.
        linears: All linear layers.
        width: Width of the residual stream, `D`.
        vocabulary: Vocabulary size, `V`.
        layers: Number of decoder layers, `L`.
        heads: Number of query heads.
        norms: Norms over the width per decoder layer.
        capped: Whether logits (or attention scores) are soft-capped, which needs `eager` attention
            and rules out a fused loss.
    """

    name: str
    source: str
    weights: tuple[Weight, ...]
    linears: tuple[Linear, ...]
    width: int
    vocabulary: int
    layers: int
    heads: int
    norms: int
    capped: bool

    @property
    def parameters(self) -> int:
        """Number of parameters, without adapters."""
        return sum(weight.size for weight in self.weights)


def model_shape(architecture: Architecture) -> ModelShape:
    """Shape of the causal LM of an architecture.

    Raises:
        TemperError: transformers has no causal LM for it, or it is not a stack of attention and MLP
            blocks.
    """
    from transformers import AutoModelForCausalLM

    config = architecture.config
    try:
        with torch.device("meta"), contextlib.redirect_stdout(None):
            network: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (ValueError, ImportError, TypeError) as error:
        raise TemperError(
            f"{FLAG}: transformers cannot build a causal LM from {architecture.source}:"
            f" {first_line(error)}; give a decoder-only language model"
        ) from error
    linears = tuple(_find_linears(network))
    in_layers = {linear.name for linear in linears if linear.place != "head"}
    layer_of = _layer_by_parameter(network)
    weights = tuple(
        Weight(
            name,
            rows=p.shape[0] if p.dim() else 1,
            size=p.numel(),
            layer=layer_of.get(id(p)),
            quantized=name.removesuffix(".weight") in in_layers,
        )
        for name, p in network.named_parameters()
    )
    first = decoder_layers(network)[0]
    return ModelShape(
        name=f"{type(network).__name__}, {sum(w.size for w in weights) / 1e9:.3g}B parameters",
        source=architecture.source,
        weights=weights,
        linears=linears,
        width=config.hidden_size,
        vocabulary=network.get_input_embeddings().weight.shape[0],
        layers=len(decoder_layers(network)),
        heads=config.num_attention_heads,
        norms=sum("norm" in name or "ln_" in name for name, _ in first.named_children()),
        capped=bool(
            getattr(config, "final_logit_softcapping", None)
            or getattr(config, "attn_logit_softcapping", None)
        ),
    )


def adapter_weights(shape: ModelShape, lora: LoRASpec) -> tuple[Weight, ...]:
    """LoRA's two matrices on every target: A (rank x inputs) and B (outputs x rank)."""
    weights = []
    for linear in adapted_linears(shape, lora):
        weights.append(
            Weight(
                f"{linear.name}.lora_A.weight",
                lora.rank,
                lora.rank * linear.inputs,
                linear.layer,
                adapter=True,
            )
        )
        weights.append(
            Weight(
                f"{linear.name}.lora_B.weight",
                linear.outputs,
                linear.outputs * lora.rank,
                linear.layer,
                adapter=True,
            )
        )
    return tuple(weights)


def adapted_linears(shape: ModelShape, lora: LoRASpec) -> list[Linear]:
    """The linear layers that get an adapter, chosen as PEFT does.

    Raises:
        TemperError: no linear layer has a name among ``lora.targets``.
    """
    if lora.targets == "all-linear":
        chosen = [x for x in shape.linears if x.place != "head"]
    else:
        chosen = [x for x in shape.linears if x.name.rsplit(".", 1)[-1] in lora.targets]
    if not chosen:
        names = sorted({linear.name.rsplit(".", 1)[-1] for linear in shape.linears})
        raise TemperError(
            f"{FLAG}.lora.targets={lora.targets}: no linear layer has such a name; choose from"
            f" {', '.join(names)}"
        )
    return chosen


def _find_linears(network: nn.Module) -> list[Linear]:
    """Linear layers with their places: the last one of a block is its output layer, the others
    read the block's input.
    """
    names = {id(module): name for name, module in network.named_modules()}
    linears = []
    for kind, blocks in (("attention", attention_blocks(network)), ("mlp", mlp_blocks(network))):
        for layer, block in enumerate(blocks):
            modules: list[Any] = [
                module for module in block.modules() if isinstance(module, (nn.Linear, Conv1D))
            ]
            for module in modules:
                outputs, inputs = module.weight.shape
                if isinstance(module, Conv1D):  # GPT-2's, transposed
                    inputs, outputs = module.weight.shape
                place = f"{kind}_out" if module is modules[-1] else f"{kind}_in"
                linears.append(Linear(names[id(module)], inputs, outputs, place, layer))
    head: Any = network.get_output_embeddings()  # type: ignore[operator]
    outputs, inputs = head.weight.shape
    linears.append(Linear(names[id(head)], inputs, outputs, "head"))
    return linears


def _layer_by_parameter(network: nn.Module) -> dict[int, int]:
    """Index of the decoder layer of each parameter, by the parameter's id."""
    return {
        id(parameter): index
        for index, layer in enumerate(decoder_layers(network))
        for parameter in layer.parameters()
    }
