"""Small model folders for the tests of edits."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from datamodules import SyntheticAlignment
from temper.models import export_network

DATA = {
    "preset": "tiny",
    "n_alignment": 12,
    "n_harmful": 6,
    "batch_size": 6,
    "harmful_batch_size": 4,
    "n_eval": 4,
    "seed": 1,
}


def save_model(folder: Path, seed: int, dtype: torch.dtype = torch.float32, **shape: int) -> Path:
    """A random Llama with the tiny language's tokenizer."""
    tokenizer = SyntheticAlignment(**DATA).tokenizer
    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    } | shape
    torch.manual_seed(seed)
    network = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **settings)
    ).to(dtype)
    export_network(network, tokenizer, folder, merge=False)
    return folder


def folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    return {
        name: tensor
        for path in sorted(folder.glob("model*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def same_bytes(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Equal names, types and bytes: -0.0 is not 0.0."""
    raw = lambda tensor: tensor.contiguous().flatten().view(torch.uint8)  # noqa: E731
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype
        and left[n].shape == right[n].shape
        and torch.equal(raw(left[n]), raw(right[n]))
        for n in left
    )


def write_shards(folder: Path, **shards: dict[str, torch.Tensor]) -> None:
    """Replace model.safetensors by several files."""
    (folder / "model.safetensors").unlink()
    for name, tensors in shards.items():
        save_file(tensors, folder / f"model-{name}.safetensors", metadata={"format": "pt"})
    weight_map = {
        key: f"model-{name}.safetensors" for name, tensors in shards.items() for key in tensors
    }
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
