"""Trains small networks under several strategies; started by test_strategies.py, alone or by
torchrun.

Reads a JSON list of cases (``{"name", "strategy", ...}``, see `train`) and writes the whole weights
of each.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

import lightning_modules  # noqa: E402
import strategies  # noqa: E402
from datamodules import SyntheticAlignment  # noqa: E402
from lightning_modules import SFTModule  # noqa: E402
from temper.errors import TemperError  # noqa: E402
from temper.losses import MeanTerms  # noqa: E402
from temper.models import LoRASpec, NetworkSpec, ShapeSpec  # noqa: E402
from tests.objectives import fit  # noqa: E402


class UnevenModule(SFTModule):
    """Two passes; the second one's loss depends on the first layer only."""

    def training_step(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        _, whole = self.gradient(batch["alignment"])
        _, low = self.gradient(batch["alignment"], self.low_terms)
        self.apply_gradient(self.weights.reduce(whole.add_(low)))

    def low_terms(self, rows):  # type: ignore[no-untyped-def]
        scores = self.score(rows, hidden=True)
        squares_BT = scores.hidden[1].square().sum(-1)
        return MeanTerms((squares_BT * scores.attended).sum(), scores.attended.sum())


OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=1e-3, eps=1e-4),
    "decaying": partial(torch.optim.AdamW, lr=1e-2, eps=1e-4, weight_decay=10.0),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}
DATA: dict[str, Any] = {
    "preset": "tiny",
    "n_alignment": 24,
    "n_harmful": 12,
    "batch_size": 8,
    "harmful_batch_size": 4,
    "n_eval": 4,
    "seed": 1,
}


def train(
    strategy: Any,
    objective: str = "BoosterModule",
    optimizer: str = "adamw",
    micro_batch_size: int | None = None,
    lora: bool = False,
    checkpointing: bool = False,
    dtype: str = "float32",
    precision: str = "32-true",
    steps: int = 3,
    settings: dict[str, Any] | None = None,
    dropout: float = 0.0,
    save: str | None = None,
    resume: str | None = None,
    launch: bool = False,
) -> dict[str, torch.Tensor]:
    """Train an objective for some steps; returns the whole trained weights by name."""
    data = SyntheticAlignment(**DATA)
    spec = NetworkSpec(
        shape=ShapeSpec(hidden_size=32, n_layers=2, n_heads=2, intermediate_size=64, seed=3),
        lora=LoRASpec(rank=2, alpha=4, dropout=dropout) if lora else None,
        activation_checkpointing=checkpointing,
        dtype=dtype,
    )
    module = (globals().get(objective) or getattr(lightning_modules, objective))(
        spec,
        optimizer=OPTIMIZERS[optimizer],
        max_grad_norm=0.5,
        micro_batch_size=micro_batch_size,
        **(settings or {}),
    )
    torch.manual_seed(7)  # LoRA's initial weights are drawn from the global generator
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    if isinstance(strategy, dict):
        kind = getattr(strategies, strategy["class_path"].rpartition(".")[2])
        strategy = kind(**strategy["init_args"])
    trainer = fit(
        module,
        data,
        steps,
        ckpt_path=resume,
        devices=devices,
        strategy=strategy if devices > 1 or launch else "auto",
        precision=precision,
    )
    if save is not None:
        trainer.save_checkpoint(save)
    gather = getattr(trainer.strategy, "gather", lambda parameter: parameter.detach())
    return {
        name: gather(parameter).cpu().clone()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for case in json.loads(options.cases.read_text()):
        name = case.pop("name")
        try:
            results[name] = train(**case)
        except TemperError as refusal:
            results[name] = str(refusal)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(results, options.out)


if __name__ == "__main__":
    main()
