"""A tiny vocabulary, shape and adapter, and helpers for tests of networks."""

from pathlib import Path

import torch
from torch import nn

from temper.models import LoRASpec, NetworkSpec, ShapeSpec, build_network, export_network
from temper.synthetic import build_tokenizer, language_spec

TOKENIZER = build_tokenizer(language_spec("tiny"))
SHAPE = ShapeSpec(hidden_size=64, n_layers=2, n_heads=2, intermediate_size=64, max_length=32)
LORA = LoRASpec(rank=2, alpha=4, targets=["q_proj", "v_proj"])
IDS = torch.tensor([[1, 8, 9, 20, 4], [1, 7, 7, 21, 2]])


def build(path: Path | None = None, **settings: object) -> nn.Module:
    """A network from a folder, or from `SHAPE`."""
    source = {"shape": SHAPE} if path is None else {"path": str(path)}
    return build_network(NetworkSpec(**source, **settings), TOKENIZER)  # type: ignore[arg-type]


def logits(network: nn.Module) -> torch.Tensor:
    """Logits of a network for `IDS`, without dropout."""
    with torch.no_grad():
        return network.eval()(input_ids=IDS).logits


def disturb(network: nn.Module, seed: int = 0, only: str = "lora_") -> nn.Module:
    """Give adapters random weights: a new adapter, with B = 0, has no effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name and only in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return network


def gradients(network: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of the NLL of `IDS`, by the names of trainable parameters."""
    network.train().zero_grad()
    network(input_ids=IDS, labels=IDS).loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }


def save_base(folder: Path) -> Path:
    """Save a network with random weights and its tokenizer; return the folder."""
    export_network(build(), TOKENIZER, folder, merge=True)
    return folder
