"""What a user says about a network."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ShapeSpec:
    """A Llama-style decoder with random weights.

    Args:
        hidden_size: Width of the residual stream.
        n_layers: Decoder layers.
        n_heads: Attention heads; must divide hidden_size.
        intermediate_size: Width of the gated MLP.
        max_length: Longest sequence, in tokens.
        seed: Seed of the weights, on its own, so that data and weights can be varied apart.
    """

    hidden_size: int = 96
    n_layers: int = 3
    n_heads: int = 4
    intermediate_size: int = 256
    max_length: int = 256
    seed: int = 0


@dataclass
class LoRASpec:
    """A low-rank adapter (Hu et al. 2021), through PEFT.

    Args:
        rank: Rank of the update.
        alpha: Scale; the update is ``alpha / rank * B A``.
        targets: Names of the linear layers that get one.
        dropout: Dropout on the adapter's input. Booster's two harmful passes draw different masks.
    """

    rank: int = 16
    alpha: int = 16
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    dropout: float = 0.0


@dataclass
class NetworkSpec:
    """Where the network comes from; give exactly one of ``path`` and ``shape``.

    Args:
        path: Folder in Hugging Face format: config.json, safetensors, tokenizer; or a LoRA adapter
            folder (adapter_config.json), whose base is loaded with it.
        shape: Build with random weights instead.
        lora: Train a new low-rank adapter and freeze the rest.
        adapter: What to do with an adapter found in ``path``: ``continue`` training it, or
            ``merge`` it into the weights first. Robustness figures depend on it: state it.
        dtype: Precision of frozen and fully trained weights. LoRA weights are always fp32.
    """

    path: str | None = None
    shape: ShapeSpec | None = None
    lora: LoRASpec | None = None
    adapter: Literal["continue", "merge"] = "continue"
    dtype: Literal["float32", "bfloat16"] = "float32"
