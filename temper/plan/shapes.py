"""The shape of a network: its weights one by one, and what a decoder layer is made of. No weights are made.

Everything that depends on an architecture is read off transformers' own modules on the meta device.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from temper.errors import TemperError
from temper.models.blocks import attention_blocks, decoder_layers, mlp_blocks
from temper.models.folder import FLAG
from temper.models.spec import LoRASpec
from temper.plan.sources import Architecture


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
    """A linear layer; ``place`` is ``attention_in``, ``attention_out``, ``mlp_in`` or ``mlp_out``, or ``head``."""

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
        capped: Logits (and scores) are capped, so that `eager` attention is needed and a fused loss is impossible.
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
        TemperError: transformers has no causal LM for it, or it is not a stack of attention and MLP blocks.
    """
    from transformers import AutoModelForCausalLM

    config = found.config
    try:
        with torch.device("meta"), contextlib.redirect_stdout(None):
            network: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (ValueError, ImportError, TypeError) as error:
        raise TemperError(f"{FLAG}: no causal LM can be made of {found.source}: {str(error).splitlines()[0]}") from error
    linears = tuple(_linears(network))
    inside = {linear.name for linear in linears if linear.place != "head"}
    numbers = _layer_numbers(network)
    weights = tuple(
        Weight(name, p.shape[0] if p.dim() else 1, p.numel(), numbers.get(id(p)), name.removesuffix(".weight") in inside)
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
        capped=bool(getattr(config, "final_logit_softcapping", None) or getattr(config, "attn_logit_softcapping", None)),
    )


def adapter_weights(shape: ModelShape, lora: LoRASpec) -> tuple[Weight, ...]:
    """The two matrices that LoRA puts on every target: A (rank x inputs) and B (outputs x rank)."""
    found = []
    for linear in adapted(shape, lora):
        found.append(Weight(f"{linear.name}.lora_A.weight", lora.rank, lora.rank * linear.inputs, linear.layer, adapter=True))
        found.append(Weight(f"{linear.name}.lora_B.weight", linear.outputs, linear.outputs * lora.rank, linear.layer, adapter=True))
    return tuple(found)


def adapted(shape: ModelShape, lora: LoRASpec) -> list[Linear]:
    """The linear layers that get an adapter: as PEFT chooses them.

    Raises:
        TemperError: there is none of these names.
    """
    every = lora.targets == "all-linear"
    chosen = [x for x in shape.linears if (x.place != "head" if every else x.name.rsplit(".", 1)[-1] in lora.targets)]
    if not chosen:
        names = sorted({linear.name.rsplit(".", 1)[-1] for linear in shape.linears})
        raise TemperError(f"{FLAG}.lora.targets={lora.targets}: no linear layer has such a name; choose from {', '.join(names)}")
    return chosen


def _linears(network: nn.Module) -> list[Linear]:
    """Linear layers by place. In each block the last one reads what the block made inside; the others read its input."""
    names = {id(module): name for name, module in network.named_modules()}
    found = []
    for kind, blocks in (("attention", attention_blocks(network)), ("mlp", mlp_blocks(network))):
        for layer, block in enumerate(blocks):
            modules: list[Any] = [module for module in block.modules() if isinstance(module, (nn.Linear, Conv1D))]
            for module in modules:
                outputs, inputs = module.weight.shape if isinstance(module, nn.Linear) else tuple(module.weight.shape)[::-1]
                place = f"{kind}_out" if module is modules[-1] else f"{kind}_in"
                found.append(Linear(names[id(module)], inputs, outputs, place, layer))
    head: Any = network.get_output_embeddings()  # type: ignore[operator]
    found.append(Linear(names[id(head)], head.weight.shape[1], head.weight.shape[0], "head"))
    return found


def _layer_numbers(network: nn.Module) -> dict[int, int]:
    return {id(p): number for number, layer in enumerate(decoder_layers(network)) for p in layer.parameters()}
