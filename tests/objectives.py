"""Small models and data for objectives, and a plain re-computation of their loss."""

import os
from functools import partial
from typing import Any

import lightning.pytorch as L
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from datamodules import SyntheticAlignment
from lightning_modules import BoosterModule, HeldBoosterModule, ObjectiveModule
from temper.data import Batch
from temper.models import LoRASpec, NetworkSpec, ShapeSpec, build_network

SHAPE = ShapeSpec(hidden_size=16, n_layers=1, n_heads=2, intermediate_size=32, seed=3)


def plain_mean_nll(network: torch.nn.Module, rows: Batch) -> torch.Tensor:
    """Mean NLL per response token, by loops over rows and tokens."""
    total = 0.0
    count = 0
    for ids, mask, labels in zip(
        rows["input_ids"], rows["attention_mask"], rows["labels"], strict=True
    ):
        length = int(mask.sum())
        logps = torch.log_softmax(network(input_ids=ids[None, :length]).logits[0], dim=-1)
        for position in range(1, length):
            if labels[position] != -100:
                total = total - logps[position - 1, labels[position]]
                count += 1
    return total / count


def plain_gradient(network: torch.nn.Module, rows: Batch) -> list[torch.Tensor]:
    """Gradient of `plain_mean_nll` over the trainable parameters."""
    return list(torch.autograd.grad(plain_mean_nll(network, rows), trainable(network)))


def plain_regulariser(
    network: torch.nn.Module, rows: Batch, lam: float, alpha: float
) -> list[torch.Tensor]:
    """``lam * (grad h(w) - grad h(w'))``, written out."""
    at_w = plain_gradient(network, rows)
    norm = torch.sqrt(sum((g**2).sum() for g in at_w))
    saved = [p.detach().clone() for p in trainable(network)]
    with torch.no_grad():
        for parameter, g in zip(trainable(network), at_w, strict=True):
            parameter -= alpha * g / norm
    at_displaced = plain_gradient(network, rows)
    with torch.no_grad():
        for parameter, value in zip(trainable(network), saved, strict=True):
            parameter.copy_(value)
    return [lam * (a - b) for a, b in zip(at_w, at_displaced, strict=True)]


def trainable(network: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters that learn."""
    return [p for p in network.parameters() if p.requires_grad]


def make_data(**changes: Any) -> SyntheticAlignment:
    """Twelve alignment rows of unequal length in batches of six, four harmful rows per batch."""
    settings = {
        "preset": "tiny",
        "n_alignment": 12,
        "n_harmful": 6,
        "batch_size": 6,
        "harmful_batch_size": 4,
        "n_eval": 4,
        "seed": 1,
    }
    return SyntheticAlignment(**(settings | changes))


def make_module(
    kind: type[ObjectiveModule] = BoosterModule,
    data: Any = None,
    double: bool = True,
    lora: bool = False,
    **settings: Any,
):
    """A module whose network is already built: float64 GPT-2, or a float32 Llama."""
    settings.setdefault("optimizer", partial(torch.optim.SGD, lr=0.1))
    spec = NetworkSpec(shape=SHAPE, lora=LoRASpec(rank=2, alpha=4) if lora else None)
    module = kind(spec, **settings)
    tokenizer = (data or make_data()).tokenizer
    module.network = exact_network(len(tokenizer)) if double else build_network(spec, tokenizer)
    return module


def make_held(refresh_every: int, **settings: Any) -> HeldBoosterModule:
    """As `make_module`: a held Booster, without a floor unless one is given."""
    settings = {"reduction_floor": None} | settings
    return make_module(HeldBoosterModule, refresh_every=refresh_every, **settings)


def exact_network(vocabulary: int) -> torch.nn.Module:
    """A GPT-2 in float64. (Llama computes its norms and rotations in float32 whatever it is
    given.)
    """
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).double().train()


def fit(
    module: ObjectiveModule, data: Any, steps: int, ckpt_path: str | None = None, **settings: Any
) -> L.Trainer:
    """Train without any side effect, anew or from a checkpoint on."""
    settings = {
        "accelerator": os.environ.get("CHECK_ACCELERATOR", "cpu"),
        "devices": 1,
        "max_steps": steps,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
    } | settings
    trainer = L.Trainer(**settings)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def global_batches(data: SyntheticAlignment, steps: int) -> list[dict[str, Batch]]:
    """The first global batches, as a run sees them."""
    data.setup("fit")
    return [
        {name: source.batch(number) for name, source in data.sources.items()}
        for number in range(steps)
    ]


# -- comparing weights


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of all weights."""
    return [p.detach().clone() for p in module.parameters()]


def trained_weights(module: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of the trainable weights."""
    return [p.detach().clone() for p in trainable(module)]


def same_bits(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Whether two lists of tensors are equal to the last bit."""
    return len(left) == len(right) and all(
        torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )


def norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """L2 norm over all tensors together."""
    return torch.sqrt(sum((tensor**2).sum() for tensor in tensors))


def relative_error(
    left: list[torch.Tensor],
    right: list[torch.Tensor],
    start: list[torch.Tensor] | None = None,
) -> float:
    """Distance of two lists of tensors, relative to the norm of the second.

    Args:
        left: Tensors to check.
        right: Expected tensors.
        start: Relative to how far the second has moved from here instead.
    """
    apart = [a - b for a, b in zip(left, right, strict=True)]
    scale = right if start is None else [b - s for b, s in zip(right, start, strict=True)]
    return float(norm(apart) / norm(scale))
