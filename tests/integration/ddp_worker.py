"""Trains and evaluates under DDP; started by test_ddp.py, and by Lightning for other ranks."""

import argparse
import json
import os
from functools import partial
from pathlib import Path

import torch

torch.set_num_threads(1)

import torch.distributed as dist  # noqa: E402

from callbacks import RunCard, SafetyEvaluation  # noqa: E402
from datamodules import SyntheticAlignment  # noqa: E402
from lightning_modules import HeldBoosterModule, SFTModule  # noqa: E402
from temper.models import NetworkSpec, ShapeSpec  # noqa: E402
from tests.objectives import fit  # noqa: E402


def count_reductions(n_trainable: int) -> list[int]:
    """Sizes of all-reduces that carry a whole gradient."""
    sizes: list[int] = []
    plain = dist.all_reduce

    def counted(tensor, *args, **kwargs):  # type: ignore[no-untyped-def]
        if tensor.numel() >= n_trainable:
            sizes.append(tensor.numel())
        return plain(tensor, *args, **kwargs)

    dist.all_reduce = counted
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--objective", default="booster")
    parser.add_argument("--refresh_every", type=int, default=1)
    parser.add_argument("--micro_batch_size", type=int)
    options = parser.parse_args()
    data = SyntheticAlignment(
        preset="tiny",
        n_alignment=24,
        n_harmful=12,
        batch_size=8,
        harmful_batch_size=4,
        n_eval=9,
        eval_batch_size=4,
        seed=1,
    )
    spec = NetworkSpec(
        shape=ShapeSpec(hidden_size=32, n_layers=2, n_heads=2, intermediate_size=64, seed=3)
    )
    optimizer = partial(torch.optim.AdamW, lr=1e-3, eps=1e-4)
    settings = {
        "optimizer": optimizer,
        "max_grad_norm": 0.5,
        "micro_batch_size": options.micro_batch_size,
    }
    if options.objective == "booster":
        module = HeldBoosterModule(
            spec,
            lam=2.0,
            alpha=0.05,
            refresh_every=options.refresh_every,
            reduction_floor=None,
            **settings,
        )
    else:
        module = SFTModule(spec, **settings)
    sizes = count_reductions(1000)
    trainer = fit(
        module,
        data,
        4,
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        limit_val_batches=1.0,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        default_root_dir=str(options.out),
        callbacks=[SafetyEvaluation(), RunCard()],
    )
    if trainer.is_global_zero:
        torch.save(
            {name: p.detach() for name, p in module.named_parameters() if p.requires_grad},
            options.out / "weights.pt",
        )
        losses = {k: float(v) for k, v in trainer.callback_metrics.items()}
        (options.out / "report.json").write_text(
            json.dumps({"reductions": len(sizes), "metrics": losses, "pid": os.getpid()})
        )


if __name__ == "__main__":
    main()
