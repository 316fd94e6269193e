"""The shape of a network: its weights one by one, and what a decoder layer is made of. No weights
are made.

Everything that depends on an architecture is read off transformers' own modules on the meta device.
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

# MERGED from temper.plan.shapes: Where a model's architecture is known from: the config, a folder,
# the hub's cache, a table of published numbers, the hub.


TABLE = "architectures.yaml"


@dataclass(frozen=True)
class Architecture:
    """A configuration of transformers.

    Attributes:
        config: As transformers reads it from a config.json.
        source: Where it came from, in words.
        adapter: Adapter that the folder holds.
    """

    config: Any
    source: str
    adapter: LoRASpec | None = None


def find_architecture(spec: NetworkSpec, vocabulary: int | None = None) -> Architecture:
    """The architecture of a network; no weights are read.

    Args:
        spec: Its shape or path.
        vocabulary: Tokens of the data's tokenizer, for a shape.

    Raises:
        TemperError: neither or both of path and shape; a shape whose vocabulary is not known; a
            path that is nowhere to be found.
    """
    check_source(spec)
    if spec.shape is not None:
        if vocabulary is None:
            raise TemperError(
                f"{FLAG}.shape: the size of the vocabulary is the tokenizer's; give"
                " data.init_args.tokenizer, or data that bring one"
            )
        return Architecture(
            llama_config(spec.shape, vocabulary), f"{FLAG}.shape, vocabulary of the data"
        )
    folder = Path(str(spec.path))
    if is_adapter(folder):
        return _of_adapter(folder, spec)
    if (folder / "config.json").exists():
        return Architecture(_read(str(folder), spec, local=True), str(folder / "config.json"))
    return _of_name(str(spec.path), spec)


def _of_adapter(folder: Path, spec: NetworkSpec) -> Architecture:
    """The base of an adapter folder, and the adapter."""
    config = read_json(folder / "adapter_config.json")
    targets = config.get("target_modules") or []
    named: Any = (
        "all-linear"
        if targets == "all-linear"
        else [targets]
        if isinstance(targets, str)
        else list(targets)
    )
    adapter = LoRASpec(int(config.get("r") or 0), int(config.get("lora_alpha") or 0), named)
    base = NetworkSpec(
        path=str(config.get("base_model_name_or_path")), local_files_only=spec.local_files_only
    )
    found = find_architecture(base)
    return Architecture(
        found.config,
        f"{found.source}, base of the adapter in {folder}",
        None if spec.adapter == "merge" else adapter,
    )


def _of_name(name: str, spec: NetworkSpec) -> Architecture:
    cached = _read(name, spec, local=True)
    if cached is not None:
        return Architecture(cached, f"the hub's cache ({name})")
    if name.rstrip("/") in _published():
        from transformers import AutoConfig

        numbers = dict(_published()[name.rstrip("/")])
        config = AutoConfig.for_model(numbers.pop("model_type"), **numbers)
        return Architecture(config, f"published numbers of {name} (temper/plan/{TABLE})")
    if not spec.local_files_only:
        return Architecture(_read(name, spec, local=False), f"the hub ({name})")
    raise TemperError(
        f"{FLAG}.path={name}: no config.json there, none in the hub's cache, and not one of the"
        f" models whose numbers are known here ({', '.join(sorted(_published()))}); give a folder,"
        f" or let its config.json be fetched: --{FLAG}.local_files_only=false"
    )


def _read(path: str, spec: NetworkSpec, local: bool) -> Any:
    """A config.json through transformers; None if it is looked for locally and is not there."""
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
            f"{FLAG}.path={path}: its config.json cannot be had: {first_line(error)}; check the"
            " name and the network"
        ) from error


@cache
def _published() -> dict[str, dict[str, Any]]:
    """Numbers by name."""
    entries = yaml.safe_load((files("temper.plan") / TABLE).read_text(encoding="utf-8"))
    return {
        name: {key: value for key, value in entry.items() if key != "names"}
        for entry in entries
        for name in entry["names"]
    }


@dataclass(frozen=True)
class Weight:
    """One weight tensor.

    Attributes:
        name: Its name in the network.
        rows: Size of the first dimension, along which FSDP2 cuts.
        size: Elements.
        layer: Number of its decoder layer; None outside of them.
        quantised: Whether it is held in few bits where the base is.
        adapter: Whether it belongs to an adapter.
    """

    name: str
    rows: int
    size: int
    layer: int | None = None
    quantised: bool = False
    adapter: bool = False


@dataclass(frozen=True)
class Linear:
    """A linear layer; ``place`` is ``attention_in``, ``attention_out``, ``mlp_in`` or ``mlp_out``,
    or ``head``.
    """

    name: str
    inputs: int
    outputs: int
    place: str
    layer: int | None = None


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only language model.

    Attributes:
        name: Its class and size, for a title.
        source: Where the shape came from.
        weights: All of them, those of an adapter excepted.
        linears: All linear layers.
        width: D, of the residual stream.
        vocabulary: V.
        layers: L.
        heads: Query heads.
        norms: Norms over the width in a decoder layer.
        capped: Logits (and scores) are capped, so that `eager` attention is needed and a fused loss
            is impossible.
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
        """Number of weights, adapters not counted."""
        return sum(weight.size for weight in self.weights)


def model_shape(found: Architecture) -> ModelShape:
    """Shape of the causal LM of an architecture.

    Raises:
        TemperError: transformers has no causal LM for it, or it is not a stack of attention and MLP
            blocks.
    """
    from transformers import AutoModelForCausalLM

    config = found.config
    try:
        with torch.device("meta"), contextlib.redirect_stdout(None):
            network: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (ValueError, ImportError, TypeError) as error:
        raise TemperError(
            f"{FLAG}: no causal LM can be made of {found.source}: {str(error).splitlines()[0]}"
        ) from error
    linears = tuple(_linears(network))
    inside = {linear.name for linear in linears if linear.place != "head"}
    numbers = _layer_numbers(network)
    weights = tuple(
        Weight(
            name,
            p.shape[0] if p.dim() else 1,
            p.numel(),
            numbers.get(id(p)),
            name.removesuffix(".weight") in inside,
        )
        for name, p in network.named_parameters()
    )
    first = decoder_layers(network)[0]
    return ModelShape(
        name=f"{type(network).__name__}, {sum(w.size for w in weights) / 1e9:.3g}B parameters",
        source=found.source,
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
    """The two matrices that LoRA puts on every target: A (rank x inputs) and B (outputs x rank)."""
    found = []
    for linear in adapted(shape, lora):
        found.append(
            Weight(
                f"{linear.name}.lora_A.weight",
                lora.rank,
                lora.rank * linear.inputs,
                linear.layer,
                adapter=True,
            )
        )
        found.append(
            Weight(
                f"{linear.name}.lora_B.weight",
                linear.outputs,
                linear.outputs * lora.rank,
                linear.layer,
                adapter=True,
            )
        )
    return tuple(found)


def adapted(shape: ModelShape, lora: LoRASpec) -> list[Linear]:
    """The linear layers that get an adapter: as PEFT chooses them.

    Raises:
        TemperError: there is none of these names.
    """
    every = lora.targets == "all-linear"
    chosen = [
        x
        for x in shape.linears
        if (x.place != "head" if every else x.name.rsplit(".", 1)[-1] in lora.targets)
    ]
    if not chosen:
        names = sorted({linear.name.rsplit(".", 1)[-1] for linear in shape.linears})
        raise TemperError(
            f"{FLAG}.lora.targets={lora.targets}: no linear layer has such a name; choose from"
            f" {', '.join(names)}"
        )
    return chosen


def _linears(network: nn.Module) -> list[Linear]:
    """Linear layers by place. In each block the last one reads what the block made inside; the
    others read its input.
    """
    names = {id(module): name for name, module in network.named_modules()}
    found = []
    for kind, blocks in (("attention", attention_blocks(network)), ("mlp", mlp_blocks(network))):
        for layer, block in enumerate(blocks):
            modules: list[Any] = [
                module for module in block.modules() if isinstance(module, (nn.Linear, Conv1D))
            ]
            for module in modules:
                outputs, inputs = (
                    module.weight.shape
                    if isinstance(module, nn.Linear)
                    else tuple(module.weight.shape)[::-1]
                )
                place = f"{kind}_out" if module is modules[-1] else f"{kind}_in"
                found.append(Linear(names[id(module)], inputs, outputs, place, layer))
    head: Any = network.get_output_embeddings()  # type: ignore[operator]
    found.append(Linear(names[id(head)], head.weight.shape[1], head.weight.shape[0], "head"))
    return found


def _layer_numbers(network: nn.Module) -> dict[int, int]:
    return {
        id(p): number
        for number, layer in enumerate(decoder_layers(network))
        for p in layer.parameters()
    }
