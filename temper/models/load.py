"""Build or load a causal LM from a `NetworkSpec` and a tokenizer.

In the order of the file: checks of the settings and of the vocabulary; loading from a folder;
building from a shape; and `build_network`, which does all of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
from temper.models.lora import (
    add_lora,
    cast_trainable_to_fp32,
    is_adapted,
    load_adapter,
)
from temper.models.quantize import check_bitsandbytes, prepare_quantized, quantization_settings
from temper.models.weight_files import (
    check_base,
    check_folder,
    check_loaded,
    check_tokens,
    without_report,
)
from temper.packages import install_hint, is_installed

# -- checks of the settings


def check_network(spec: NetworkSpec) -> None:
    """Check all settings of a network without loading or downloading anything.

    Raises:
        TemperError: neither or both of path and shape; a folder that is missing, holds no model, or
            is not safe to read; options that contradict each other, or that this machine does not
            support.
    """
    check_source(spec)
    for problem in _invalid_settings(spec):
        raise TemperError(f"{FLAG}.{problem}")
    if spec.quantization is not None:
        check_bitsandbytes(spec.quantization)
    if spec.path is not None and (spec.local_files_only or Path(spec.path).is_dir()):
        _check_path(spec, spec_folder(spec))


def check_source(spec: NetworkSpec) -> None:
    """Check that exactly one of ``path`` and ``shape`` is given.

    Raises:
        TemperError: neither or both of path and shape.
    """
    if (spec.path is None) == (spec.shape is None):
        found = "both" if spec.path else "neither"
        raise TemperError(
            f"{FLAG}: {found} of path and shape given; set exactly one, for example"
            f" --{FLAG}.path=runs/demo/base/export"
        )


def _invalid_settings(spec: NetworkSpec) -> Iterator[str]:
    """Yield an error message for every invalid setting that can be found without the folder."""
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
            "adapter=new: describe the new adapter, for example lora.rank=16; or set"
            " adapter=continue to train the existing one"
        )
    if spec.attention == "flash_attention_2" and not is_installed("flash_attn"):
        missing = install_hint("flash_attn")
        yield f"attention=flash_attention_2 cannot be used: {missing}, or use sdpa"
    if spec.attention == "flash_attention_2" and spec.dtype == "float32":
        yield "attention=flash_attention_2 computes in 16 bits: set dtype=bfloat16, or use sdpa"
    if spec.attention == "flex_attention" and not torch.accelerator.is_available():
        yield "attention=flex_attention has no backward pass on a CPU: use sdpa"


def _check_path(spec: NetworkSpec, folder: Path) -> None:
    """Check the folder of ``spec.path``, and that the settings suit what it holds."""
    check_folder(folder, spec)
    adapted = is_adapter(folder)
    if adapted and spec.lora is not None and spec.adapter == "continue":
        raise TemperError(
            f"{FLAG}.lora is set and path={spec.path} already holds an adapter: set"
            f" {FLAG}.adapter=merge to merge it and train a new one, adapter=new to keep it frozen"
            " beside a new one, or drop lora to continue it"
        )
    quantization = _quantization(folder, spec)
    if adapted:
        _check_merge(quantization, spec)
    if quantization and not adapted and spec.lora is None:
        raise TemperError(
            f"{FLAG}: {quantization} weights are frozen, so there would be nothing to train: give"
            f" an adapter, for example --{FLAG}.lora.rank=16"
            + (", or drop quantization for full fine-tuning" if spec.quantization else "")
        )


def _quantization(folder: Path, spec: NetworkSpec) -> str | None:
    """Quantization method of a folder's weights, by its config or by the settings; None if dense.

    Raises:
        TemperError: ``quantization`` is set for weights that are quantized already.
    """
    config = folder / "config.json"
    stored = read_json(config).get("quantization_config") if config.exists() else None
    if stored and spec.quantization:
        raise TemperError(
            f"{FLAG}.quantization={spec.quantization}: the weights in path={spec.path} are"
            f" quantized already ({stored.get('quant_method')}); drop it"
        )
    return str(stored.get("quant_method")) if stored else spec.quantization


def _check_merge(quantization: str | None, spec: NetworkSpec) -> None:
    """Refuse to merge an adapter into quantized weights."""
    if quantization and spec.adapter == "merge":
        raise TemperError(
            f"{FLAG}.adapter=merge with {quantization} weights: the merged weights would be"
            " quantized again, and would not be the network that was trained; use adapter=new or"
            " continue, or merge in full precision first and quantize that export"
        )


# -- check of the vocabulary


def check_vocabulary(spec: NetworkSpec, base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the data's tokenizer has the vocabulary of the network's.

    Every token of the network's tokenizer must have the same id in the data's. The data's may have
    more tokens, as long as the network has an embedding for them.

    Args:
        spec: The network; its tokenizer is in its folder, or in that of an adapter's base model.
        base: Folder with the config.json of the network (of the base model, for an adapter).
        tokenizer: The data's.

    Raises:
        TemperError: the vocabularies differ; or the network's folder has no tokenizer.
    """
    own = _read_vocabulary(tokenizer_folder(spec), spec.trust_remote_code)
    given = tokenizer.get_vocab()
    n_embeddings = count_embeddings(base, spec)
    different = {token: i for token, i in own.items() if given.get(token) != i}
    different |= {
        token: i
        for token, i in given.items()
        if own.get(token) != i and (token in own or i >= n_embeddings)
    }
    if different:
        first = min(different, key=lambda token: different[token])
        raise TemperError(
            f"{FLAG}.path={spec.path}: its vocabulary ({len(own)} tokens, {n_embeddings}"
            f" embeddings) is not the data's ({len(given)} tokens), first at token {first!r}; use"
            " the tokenizer"
            " of this folder, and with synthetic data the same data.init_args.preset and"
            " language_seed in every stage"
        )
    if tokenizer.pad_token_id is not None and int(tokenizer.pad_token_id) >= n_embeddings:
        raise TemperError(
            f"{FLAG}.path={spec.path}: the pad token {tokenizer.pad_token!r} has the id"
            f" {tokenizer.pad_token_id}, and the network {n_embeddings} embeddings; set"
            " tokenizer.pad_token = tokenizer.eos_token and save it beside the model"
            " (tokenizer.save_pretrained)"
        )
    check_tokens(tokenizer, n_embeddings, f"{FLAG}.path={spec.path}")


def _read_vocabulary(folder: Path, trust_remote_code: bool) -> dict[str, int]:
    """Ids by token, added tokens included, of the tokenizer in a folder.

    Read from tokenizer.json where there is one: that takes a second for 250,000 tokens, and loading
    the tokenizer takes longer.
    """
    if not (folder / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        return vocabulary
    stored = read_json(folder / "tokenizer.json")
    ids = stored["model"]["vocab"]
    if isinstance(ids, list):  # Unigram: (token, score) pairs in id order
        ids = {token: i for i, (token, _score) in enumerate(ids)}
    # Added tokens (special ones) may be missing from the model's own table.
    added = {entry["content"]: entry["id"] for entry in stored.get("added_tokens") or []}
    return {**ids, **added}


# -- loading from a folder


def load_network(folder: Path, spec: NetworkSpec, **settings: Any) -> nn.Module:
    """Load the causal LM in a folder, from safetensors.

    Args:
        folder: A folder that passed `check_folder`.
        spec: Gives precision, attention implementation and trust in remote code.
        settings: More arguments of `transformers.AutoModelForCausalLM.from_pretrained`.

    Raises:
        TemperError: transformers cannot load the folder, or its files do not hold all weights of
            the network and no others.
    """
    from transformers import AutoModelForCausalLM

    with _translate_load_errors(folder, spec), without_report():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, spec.dtype),
            use_safetensors=True,
            local_files_only=spec.local_files_only,
            trust_remote_code=spec.trust_remote_code,
            attn_implementation=spec.attention,
            output_loading_info=True,
            **settings,
        )
    network: nn.Module = loaded[0]
    check_loaded(network, loaded[1], f"{FLAG}.path={spec.path}")
    return network


def count_embeddings(folder: Path, spec: NetworkSpec) -> int:
    """Return the number of token embeddings of the network in a folder, by its config.

    Raises:
        TemperError: transformers cannot read the config.
    """
    return int(_load_text_config(folder, spec).vocab_size)


def hidden_size(spec: NetworkSpec) -> int:
    """Return the hidden size of a network, by its shape or its config, without its weights.

    Raises:
        TemperError: there is no such folder, or transformers cannot read its config.
    """
    if spec.shape is not None:
        return spec.shape.hidden_size
    folder = spec_folder(spec, weights=False)
    if is_adapter(folder):
        folder = base_folder(folder, spec, weights=False)
    return int(_load_text_config(folder, spec).hidden_size)


def _load_text_config(folder: Path, spec: NetworkSpec) -> Any:
    from transformers import AutoConfig

    with _translate_load_errors(folder, spec):
        config = AutoConfig.from_pretrained(
            folder, local_files_only=spec.local_files_only, trust_remote_code=spec.trust_remote_code
        )
        return config.get_text_config()


@contextmanager
def _translate_load_errors(folder: Path, spec: NetworkSpec) -> Iterator[None]:
    """Raise errors of transformers as a one-line `TemperError` with a way out."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        needs_code = "auto_map" in read_json(folder / "config.json")
        way_out = "see its config.json"
        if isinstance(error, RuntimeError | SafetensorError):
            way_out = (
                "its weights are damaged, or do not fit its config.json: download or export it"
                " again"
            )
        if needs_code and not spec.trust_remote_code:
            way_out = (
                "it comes with code of its own: set trust_remote_code=true if you trust its authors"
            )
        raise TemperError(
            f"{FLAG}.path={spec.path}: transformers cannot load it: {first_line(error)}; {way_out}"
        ) from error


# -- building from a shape


def build_from_shape(
    shape: ShapeSpec, tokenizer: PreTrainedTokenizerBase, attention: Attention | None = None
) -> nn.Module:
    """Build a Llama with random weights for the vocabulary of a tokenizer.

    The weights depend only on the shape and its seed.

    Raises:
        TemperError: ``n_heads`` does not divide ``hidden_size``.
    """
    special_ids = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = llama_config(shape, len(tokenizer), **special_ids)
    config._attn_implementation = attention
    # Built on the CPU wherever training will run: a seed gives the same network on every machine,
    # and no device's random generator changes.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(shape.seed)
        return LlamaForCausalLM(config)


def llama_config(shape: ShapeSpec, vocab_size: int, **special_ids: Any) -> LlamaConfig:
    """Return the Llama config of a shape.

    Raises:
        TemperError: ``n_heads`` does not divide ``hidden_size``.
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


# -- all of it


def build_network(spec: NetworkSpec, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """Build or load the network, check its vocabulary against the tokenizer, and add adapters.

    Raises:
        TemperError: as `check_network`; or the vocabulary of the folder is not the tokenizer's; or
            the tokenizer has no pad token.
    """
    check_network(spec)
    if tokenizer.pad_token_id is None:
        raise TemperError(
            "the tokenizer has no pad token: set one, for example tokenizer.pad_token ="
            " tokenizer.eos_token, and save it beside the model (tokenizer.save_pretrained)"
        )
    if spec.shape is not None:
        network = build_from_shape(spec.shape, tokenizer, spec.attention)
        network = network.to(getattr(torch, spec.dtype))
    else:
        network = _load_from_folder(spec, tokenizer)
    network.generation_config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]
    if spec.lora is not None:
        on_hub = spec.path is not None and not Path(spec.path).is_dir()
        network = add_lora(network, spec.lora, spec.revision if on_hub else None)
    if is_adapted(network):
        cast_trainable_to_fp32(network)
    if spec.activation_checkpointing:
        checkpoint_activations(network)
    if spec.compile:
        compile_layers(network)
    return network


def _load_from_folder(spec: NetworkSpec, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """Load the network of ``spec.path``, with its adapter if it is an adapter folder."""
    folder = spec_folder(spec)
    _check_path(spec, folder)  # again: a hub model could not be checked before its download
    base = base_folder(folder, spec) if is_adapter(folder) else folder
    quantization = _quantization(base, spec)
    if base != folder:
        _check_merge(quantization, spec)
        check_base(base, spec)
    check_vocabulary(spec, base, tokenizer)
    network = load_network(base, spec, **quantization_settings(spec))
    if quantization:
        prepare_quantized(network)
    if base != folder:
        return load_adapter(network, folder, spec)
    # An adapter-only export names this as its base model; transformers sets the cache folder.
    network.name_or_path = str(spec.path)  # type: ignore[assignment]
    return network
