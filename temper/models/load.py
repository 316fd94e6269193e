"""The network in a model folder, once the folder is known to be safe to read."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from temper.errors import TemperError
from temper.models.blocks import checkpoint_activations, compile_layers
from temper.models.folder import (
    FLAG,
    Attention,
    NetworkSpec,
    ShapeSpec,
    base_folder,
    first_line,
    is_adapter,
    read_json,
    spec_folder,
    tokenizer_folder,
)
from temper.models.lora import add_lora, is_adapted, load_adapter, trainable_in_fp32
from temper.models.quantise import check_bitsandbytes, prepare_quantised, quantisation_settings
from temper.packages import install_hint, is_installed

# MERGED from temper.models.load: Whether a network speaks the vocabulary of the data's tokenizer.


def check_vocabulary(spec: NetworkSpec, base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that means other tokens by the network's ids.

    Every token of the network's tokenizer must have the same id in the data's. The data's may have
    more, as long as the network has an embedding for them.

    Args:
        spec: The network; its tokenizer is beside it, or beside the base of an adapter.
        base: Folder with the config.json of the network (of the base, for an adapter).
        tokenizer: The data's.

    Raises:
        TemperError: as said; or the network's folder has no tokenizer.
    """
    found, wanted = (
        _vocabulary(tokenizer_folder(spec), spec.trust_remote_code),
        tokenizer.get_vocab(),
    )
    rows = count_embeddings(base, spec)
    wrong = {token: i for token, i in found.items() if wanted.get(token) != i}
    wrong |= {
        token: i
        for token, i in wanted.items()
        if found.get(token) != i and (token in found or i >= rows)
    }
    if wrong:
        first = min(wrong, key=lambda token: wrong[token])
        raise TemperError(
            f"{FLAG}.path={spec.path}: its vocabulary ({len(found)} tokens, {rows} embeddings) is"
            f" not the data's ({len(wanted)} tokens), first at token {first!r}; use the tokenizer"
            " of this folder, and with synthetic data the same data.init_args.preset and"
            " language_seed in every stage"
        )
    if tokenizer.pad_token_id is not None and int(tokenizer.pad_token_id) >= rows:
        raise TemperError(
            f"{FLAG}.path={spec.path}: the pad token {tokenizer.pad_token!r} has the id"
            f" {tokenizer.pad_token_id}, and the network {rows} embeddings; set tokenizer.pad_token"
            " = tokenizer.eos_token and save it beside the model (tokenizer.save_pretrained)"
        )


def _vocabulary(folder: Path, trust_remote_code: bool) -> dict[str, int]:
    """Ids by token, added ones included: from tokenizer.json where there is one, which takes a
    second for 250,000 tokens.
    """
    if not (folder / "tokenizer.json").exists():
        beside = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        vocabulary: dict[str, int] = beside.get_vocab()
        return vocabulary
    stored = read_json(folder / "tokenizer.json")
    found = stored["model"]["vocab"]
    if isinstance(found, list):  # Unigram: (token, score) pairs in id order
        found = {token: i for i, (token, _score) in enumerate(found)}
    # Added tokens (special ones) may live outside the model's own table.
    return {
        **found,
        **{entry["content"]: entry["id"] for entry in stored.get("added_tokens") or []},
    }


# MERGED from temper.models.load: Networks with random weights.


def from_shape(
    shape: ShapeSpec, tokenizer: PreTrainedTokenizerBase, attention: Attention | None = None
) -> nn.Module:
    """A Llama of a shape, for the vocabulary of a tokenizer; its weights depend on the shape and
    its seed alone.

    Raises:
        TemperError: the heads do not divide the width.
    """
    ids = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = llama_config(shape, len(tokenizer), **ids)
    config._attn_implementation = attention
    # On the CPU, wherever training will be: a seed is one network, and no device's generator is
    # touched.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(shape.seed)
        return LlamaForCausalLM(config)


def llama_config(shape: ShapeSpec, vocab_size: int, **special_ids: Any) -> LlamaConfig:
    """The architecture of a shape.

    Raises:
        TemperError: the heads do not divide the width.
    """
    if shape.hidden_size % shape.n_heads:
        raise TemperError(
            f"{FLAG}.shape: n_heads={shape.n_heads} does not divide hidden_size={shape.hidden_size}"
        )
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        max_position_embeddings=shape.max_length,
        tie_word_embeddings=False,
        **special_ids,
    )


SAFE = {"model": "model.safetensors", "adapter": "adapter_model.safetensors"}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_folder(folder: Path, spec: NetworkSpec) -> None:
    """Refuse a folder that holds no network, or one that is not safe to read.

    Raises:
        TemperError: no config; weights as pickles only (reading one runs what it holds); an index
            of weights that points out of the folder.
    """
    if not (folder / "config.json").exists() and not is_adapter(folder):
        raise TemperError(
            f"{FLAG}.path={spec.path}: neither config.json nor adapter_config.json in it; give a"
            " run's export/ folder"
        )
    for index in folder.glob("*.index.json"):
        _check_index(index, spec)
    name = SAFE["adapter" if is_adapter(folder) else "model"]
    in_parts = (
        not is_adapter(folder) and (folder / f"{name}.index.json").exists()
    )  # PEFT reads one file, or the pickle beside it
    if not (folder / name).exists() and not in_parts:
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        if pickles:
            raise TemperError(
                f"{FLAG}.path={spec.path}: {pickles[0]} is a pickle, and reading one can run any"
                f" code; no {name} in it. Where you trust it, load it with transformers (or peft)"
                " and save it again: save_pretrained writes safetensors"
            )
        raise TemperError(
            f"{FLAG}.path={spec.path}: no {name} in it; save the model again (save_pretrained)"
        )


def _check_index(index: Path, spec: NetworkSpec) -> None:
    shards = read_json(index).get("weight_map", {})
    for name in shards.values() if isinstance(shards, dict) else [shards]:
        parts = PurePosixPath(str(name)).parts
        if (
            not isinstance(name, str)
            or not parts
            or ".." in parts
            or name.startswith("/")
            or "\\" in name
            or ":" in name
        ):
            raise TemperError(
                f"{FLAG}.path={spec.path}: {index.name} names {name!r}, which is not inside the"
                " folder; do not use this model"
            )


def load_network(folder: Path, spec: NetworkSpec, **settings: Any) -> nn.Module:
    """The causal LM in a folder, from safetensors.

    Args:
        folder: Passed `check_folder`.
        spec: Its precision, attention and trust.
        settings: More of `transformers.AutoModelForCausalLM.from_pretrained`.

    Raises:
        TemperError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    with _explained(folder, spec):
        network: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, spec.dtype),
            use_safetensors=True,
            local_files_only=spec.local_files_only,
            trust_remote_code=spec.trust_remote_code,
            attn_implementation=spec.attention,
            **settings,
        )
    return network


def count_embeddings(folder: Path, spec: NetworkSpec) -> int:
    """How many tokens the network in a folder has an embedding for, by its config.

    Raises:
        TemperError: transformers cannot read it.
    """
    return int(_text_config(folder, spec).vocab_size)


def hidden_size(spec: NetworkSpec) -> int:
    """Width of a network, by its shape or its config; no weights are fetched.

    Raises:
        TemperError: there is no such folder, or transformers cannot read its config.
    """
    if spec.shape is not None:
        return spec.shape.hidden_size
    folder = spec_folder(spec, weights=False)
    return int(
        _text_config(
            base_folder(folder, spec, weights=False) if is_adapter(folder) else folder, spec
        ).hidden_size
    )


def _text_config(folder: Path, spec: NetworkSpec) -> Any:
    from transformers import AutoConfig

    with _explained(folder, spec):
        config = AutoConfig.from_pretrained(
            folder, local_files_only=spec.local_files_only, trust_remote_code=spec.trust_remote_code
        )
        return config.get_text_config()


@contextmanager
def _explained(folder: Path, spec: NetworkSpec) -> Iterator[None]:
    """Errors of transformers as a line with a way out."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        own = "auto_map" in read_json(folder / "config.json") and not spec.trust_remote_code
        way_out = "see its config.json"
        if isinstance(error, RuntimeError | SafetensorError):
            way_out = (
                "its weights are damaged, or those of another config.json: fetch or export it again"
            )
        if own:
            way_out = (
                "it comes with code of its own: set trust_remote_code=true if you trust its authors"
            )
        raise TemperError(
            f"{FLAG}.path={spec.path}: transformers cannot load it: {first_line(error)}; {way_out}"
        ) from error


# MERGED from temper.models.load: From a `NetworkSpec` and a tokenizer to a causal LM, or a clear
# refusal.


def check_network(spec: NetworkSpec) -> None:
    """Refuse what can be refused without loading or fetching anything.

    Raises:
        TemperError: neither or both of path and shape; a folder that is missing, holds no model, or
            is not safe to read; options that contradict each other, or that this machine cannot
            honour.
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
        raise TemperError(
            f"{FLAG}: {found} of path and shape given; set exactly one, for example"
            f" --{FLAG}.path=runs/demo/base/export"
        )


def _refusals(spec: NetworkSpec) -> Iterator[str]:
    """What is wrong with a spec, whatever is in its folder."""
    if spec.shape is not None:
        for name, value in (
            ("revision", spec.revision),
            ("trust_remote_code", spec.trust_remote_code),
            ("quantization", spec.quantization),
        ):
            if value:
                yield (
                    f"{name}={value} is for networks that are loaded, and shape builds one; drop it"
                )
    if spec.lora is not None:
        if spec.lora.rank < 1:
            yield f"lora.rank={spec.lora.rank}: give a whole number >= 1"
        if not 0 <= spec.lora.dropout < 1:
            yield f"lora.dropout={spec.lora.dropout}: give a number in [0, 1)"
        if not spec.lora.targets:
            yield "lora.targets=[]: name at least one layer, or all-linear"
    elif spec.adapter == "new":
        yield (
            "adapter=new: say what the new adapter is, for example lora.rank=16; or set"
            " adapter=continue to train the one that is found"
        )
    if spec.attention == "flash_attention_2" and not is_installed("flash_attn"):
        missing = install_hint("flash_attn")
        yield f"attention=flash_attention_2 cannot be used: {missing}, or use sdpa"
    if spec.attention == "flash_attention_2" and spec.dtype == "float32":
        yield "attention=flash_attention_2 computes in 16 bits: set dtype=bfloat16, or use sdpa"
    if spec.attention == "flex_attention" and not torch.accelerator.is_available():
        yield "attention=flex_attention has no backward pass on a CPU: use sdpa"


def _check_path(spec: NetworkSpec, folder: Path) -> None:
    check_folder(folder, spec)
    found = is_adapter(folder)
    if found and spec.lora is not None and spec.adapter == "continue":
        raise TemperError(
            f"{FLAG}.lora is set and path={spec.path} already holds an adapter: set"
            f" {FLAG}.adapter=merge to merge it and train a new one, adapter=new to keep it frozen"
            " beside a new one, or drop lora to continue it"
        )
    few_bits = _few_bits(folder, spec)
    if found:
        _refuse_merge(few_bits, spec)
    if few_bits and not found and spec.lora is None:
        raise TemperError(
            f"{FLAG}: weights in {few_bits} are frozen, and nothing else would learn: give an"
            f" adapter, for example --{FLAG}.lora.rank=16"
            + (", or drop quantization for full fine-tuning" if spec.quantization else "")
        )


def _few_bits(folder: Path, spec: NetworkSpec) -> str | None:
    """What the weights of a folder are held in, if it is few bits: by its config, or as the spec
    asks.
    """
    config = folder / "config.json"
    stored = read_json(config).get("quantization_config") if config.exists() else None
    if stored and spec.quantization:
        raise TemperError(
            f"{FLAG}.quantization={spec.quantization}: the weights in path={spec.path} are"
            f" quantised already ({stored.get('quant_method')}); drop it"
        )
    return str(stored.get("quant_method")) if stored else spec.quantization


def _refuse_merge(few_bits: str | None, spec: NetworkSpec) -> None:
    if few_bits and spec.adapter == "merge":
        raise TemperError(
            f"{FLAG}.adapter=merge with weights in {few_bits}: the merged weights would be rounded"
            " to few bits again, and would not be the network that was trained; use adapter=new or"
            " continue, or merge in full precision first and quantise that export"
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
            "the tokenizer has no pad token: set one, for example tokenizer.pad_token ="
            " tokenizer.eos_token, and save it beside the model (tokenizer.save_pretrained)"
        )
    if spec.shape is not None:
        network = from_shape(spec.shape, tokenizer, spec.attention).to(getattr(torch, spec.dtype))
    else:
        network = _from_folder(spec, tokenizer)
    network.generation_config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]
    if spec.lora is not None:
        network = add_lora(
            network,
            spec.lora,
            None if spec.path is None or Path(spec.path).is_dir() else spec.revision,
        )
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
