"""The network in a model folder, once the folder is known to be safe to read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from temper.errors import TemperError
from temper.models.folder import FLAG, base_folder, first_line, is_adapter, read_json, spec_folder
from temper.models.spec import NetworkSpec

SAFE = {"model": "model.safetensors", "adapter": "adapter_model.safetensors"}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_folder(folder: Path, spec: NetworkSpec) -> None:
    """Refuse a folder that holds no network, or one that is not safe to read.

    Raises:
        TemperError: no config; weights as pickles only (reading one runs what it holds); an index of weights
            that points out of the folder.
    """
    if not (folder / "config.json").exists() and not is_adapter(folder):
        raise TemperError(f"{FLAG}.path={spec.path}: neither config.json nor adapter_config.json in it; give a run's export/ folder")
    for index in folder.glob("*.index.json"):
        _check_index(index, spec)
    name = SAFE["adapter" if is_adapter(folder) else "model"]
    in_parts = not is_adapter(folder) and (folder / f"{name}.index.json").exists()  # PEFT reads one file, or the pickle beside it
    if not (folder / name).exists() and not in_parts:
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        if pickles:
            raise TemperError(
                f"{FLAG}.path={spec.path}: {pickles[0]} is a pickle, and reading one can run any code; no {name} in it. Where you trust "
                "it, load it with transformers (or peft) and save it again: save_pretrained writes safetensors"
            )
        raise TemperError(f"{FLAG}.path={spec.path}: no {name} in it; save the model again (save_pretrained)")


def _check_index(index: Path, spec: NetworkSpec) -> None:
    shards = read_json(index).get("weight_map", {})
    for name in shards.values() if isinstance(shards, dict) else [shards]:
        parts = PurePosixPath(str(name)).parts
        if not isinstance(name, str) or not parts or ".." in parts or name.startswith("/") or "\\" in name or ":" in name:
            raise TemperError(
                f"{FLAG}.path={spec.path}: {index.name} names {name!r}, which is not inside the folder; do not use this model"
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
            folder, dtype=getattr(torch, spec.dtype), use_safetensors=True, local_files_only=spec.local_files_only,
            trust_remote_code=spec.trust_remote_code, attn_implementation=spec.attention, **settings,
        )  # fmt: skip
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
    return int(_text_config(base_folder(folder, spec, weights=False) if is_adapter(folder) else folder, spec).hidden_size)


def _text_config(folder: Path, spec: NetworkSpec) -> Any:
    from transformers import AutoConfig

    with _explained(folder, spec):
        config = AutoConfig.from_pretrained(folder, local_files_only=spec.local_files_only, trust_remote_code=spec.trust_remote_code)
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
            way_out = "its weights are damaged, or those of another config.json: fetch or export it again"
        if own:
            way_out = "it comes with code of its own: set trust_remote_code=true if you trust its authors"
        raise TemperError(f"{FLAG}.path={spec.path}: transformers cannot load it: {first_line(error)}; {way_out}") from error
