"""From a `NetworkSpec` and a tokenizer to a causal LM, or a clear refusal."""

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from temper.errors import TemperError
from temper.models.execution import checkpoint_activations, compile_layers
from temper.models.folder import FLAG, base_folder, is_adapter, read_json, spec_folder
from temper.models.load import check_folder, load_network
from temper.models.lora import add_lora, is_adapted, load_adapter, trainable_in_fp32
from temper.models.quantise import check_bitsandbytes, prepare_quantised, quantisation_settings
from temper.models.shape import from_shape
from temper.models.spec import NetworkSpec
from temper.models.vocabulary import check_vocabulary


def check_network(spec: NetworkSpec) -> None:
    """Refuse what can be refused without loading or fetching anything.

    Raises:
        TemperError: neither or both of path and shape; a folder that is missing, holds no model, or is not safe to
            read; options that contradict each other, or that this machine cannot honour.
    """
    check_source(spec)
    for refusal in _refusals(spec):
        raise TemperError(f"{FLAG}.{refusal}")
    if spec.quantization is not None:
        check_bitsandbytes(spec.quantization)
    if spec.path is not None and (spec.local_files_only or Path(spec.path).is_dir()):
        _check_path(spec, spec_folder(spec))


def check_source(spec: NetworkSpec) -> None:
    """Refuse a network that comes from nowhere, or from two places.

    Raises:
        TemperError: neither or both of path and shape.
    """
    if (spec.path is None) == (spec.shape is None):
        found = "both" if spec.path else "neither"
        raise TemperError(f"{FLAG}: {found} of path and shape given; set exactly one, for example --{FLAG}.path=runs/demo/base/export")


def _refusals(spec: NetworkSpec) -> Iterator[str]:
    """What is wrong with a spec, whatever is in its folder."""
    if spec.shape is not None:
        for name, value in (
            ("revision", spec.revision),
            ("trust_remote_code", spec.trust_remote_code),
            ("quantization", spec.quantization),
        ):
            if value:
                yield f"{name}={value} is for networks that are loaded, and shape builds one; drop it"
    if spec.lora is not None:
        if spec.lora.rank < 1:
            yield f"lora.rank={spec.lora.rank}: give a whole number >= 1"
        if not 0 <= spec.lora.dropout < 1:
            yield f"lora.dropout={spec.lora.dropout}: give a number in [0, 1)"
        if not spec.lora.targets:
            yield "lora.targets=[]: name at least one layer, or all-linear"
    elif spec.adapter == "new":
        yield "adapter=new: say what the new adapter is, for example lora.rank=16; or set adapter=continue to train the one that is found"
    if spec.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        yield "attention=flash_attention_2 is the package flash-attn, which is not installed: pip install flash-attn, or use sdpa"
    if spec.attention == "flash_attention_2" and spec.dtype == "float32":
        yield "attention=flash_attention_2 computes in 16 bits: set dtype=bfloat16, or use sdpa"
    if spec.attention == "flex_attention" and not torch.accelerator.is_available():
        yield "attention=flex_attention has no backward pass on a CPU: use sdpa"


def _check_path(spec: NetworkSpec, folder: Path) -> None:
    check_folder(folder, spec)
    found = is_adapter(folder)
    if found and spec.lora is not None and spec.adapter == "continue":
        raise TemperError(
            f"{FLAG}.lora is set and path={spec.path} already holds an adapter: set {FLAG}.adapter=merge to merge it "
            "and train a new one, adapter=new to keep it frozen beside a new one, or drop lora to continue it"
        )
    few_bits = _few_bits(folder, spec)
    if found:
        _refuse_merge(few_bits, spec)
    if few_bits and not found and spec.lora is None:
        raise TemperError(
            f"{FLAG}: weights in {few_bits} are frozen, and nothing else would learn: give an adapter, for example --{FLAG}.lora.rank=16"
            + (", or drop quantization for full fine-tuning" if spec.quantization else "")
        )


def _few_bits(folder: Path, spec: NetworkSpec) -> str | None:
    """What the weights of a folder are held in, if it is few bits: by its config, or as the spec asks."""
    config = folder / "config.json"
    stored = read_json(config).get("quantization_config") if config.exists() else None
    if stored and spec.quantization:
        raise TemperError(
            f"{FLAG}.quantization={spec.quantization}: the weights in path={spec.path} are quantised already "
            f"({stored.get('quant_method')}); drop it"
        )
    return str(stored.get("quant_method")) if stored else spec.quantization


def _refuse_merge(few_bits: str | None, spec: NetworkSpec) -> None:
    if few_bits and spec.adapter == "merge":
        raise TemperError(
            f"{FLAG}.adapter=merge with weights in {few_bits}: the merged weights would be rounded to few bits again, and would not be the "
            "network that was trained; use adapter=new or continue, or merge in full precision first and quantise that export"
        )


def build_network(spec: NetworkSpec, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """Build or load the network, check that it speaks the tokenizer's vocabulary, add adapters.

    Raises:
        TemperError: as `check_network`; or the vocabulary of the folder is not the data's; or the
            tokenizer has no token for padding.
    """
    check_network(spec)
    if tokenizer.pad_token_id is None:
        raise TemperError(
            "the tokenizer has no pad token: set one, for example tokenizer.pad_token = tokenizer.eos_token, and save it beside the model "
            "(tokenizer.save_pretrained)"
        )
    if spec.shape is not None:
        network = from_shape(spec.shape, tokenizer, spec.attention).to(getattr(torch, spec.dtype))
    else:
        network = _from_folder(spec, tokenizer)
    network.generation_config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]
    if spec.lora is not None:
        network = add_lora(network, spec.lora, None if spec.path is None or Path(spec.path).is_dir() else spec.revision)
    if is_adapted(network):
        trainable_in_fp32(network)
    if spec.activation_checkpointing:
        checkpoint_activations(network)
    if spec.compile:
        compile_layers(network)
    return network


def _from_folder(spec: NetworkSpec, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    folder = spec_folder(spec)
    _check_path(spec, folder)  # again: what was on the hub is here now
    base = base_folder(folder, spec) if is_adapter(folder) else folder
    few_bits = _few_bits(base, spec)
    if base != folder:
        _refuse_merge(few_bits, spec)
        check_folder(base, dataclasses.replace(spec, path=str(base)))
    check_vocabulary(spec, base, tokenizer)
    network = load_network(base, spec, **quantisation_settings(spec))
    if few_bits:
        prepare_quantised(network)
    if base != folder:
        return load_adapter(network, folder, spec)
    network.name_or_path = str(spec.path)  # type: ignore[assignment]  # what an adapter-only export will name: no folder of a cache
    return network
