"""Shapes for tests: published models, and small models of any architecture."""

from typing import Any

from transformers import AutoConfig

from temper.models import NetworkSpec
from temper.plan import Setup
from temper.plan.shapes import Architecture, ModelShape, find_architecture, model_shape

LLAMA2 = "meta-llama/Llama-2-7b-hf"
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def published(path: str = LLAMA2) -> ModelShape:
    """Shape of a published model."""
    return model_shape(find_architecture(NetworkSpec(path=path)))


def small_config(kind: str = "llama", **changes: Any) -> Any:
    """A decoder of four layers; head width 32."""
    numbers: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    }
    if kind in ("gemma2", "gemma3_text"):
        numbers["head_dim"] = 32
    return AutoConfig.for_model(kind, **(IDS | numbers | changes))


def small_shape(kind: str = "llama", **changes: Any) -> ModelShape:
    """Shape of `small_config`."""
    return model_shape(Architecture(small_config(kind, **changes), "a test"))


def setup(**changes: Any) -> Setup:
    """Sixteen rows of 512 tokens on one device, everything trained in float32."""
    given: dict[str, Any] = {
        "strategy": "auto",
        "devices": 1,
        "sequence_length": 512,
        "batch_sizes": {None: 16},
    }
    return Setup(**(given | changes))
