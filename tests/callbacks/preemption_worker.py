"""Trains on two ranks and signals one of them; started by test_preemption.py."""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

import lightning.pytorch as L  # noqa: E402

from callbacks import Preemption  # noqa: E402
from tests.objectives import fit, make_data, make_module  # noqa: E402


class Sender(L.Callback):
    """Sends a real signal to one rank, in the middle of its step."""

    def __init__(self, rank: int, step: int, name: str) -> None:
        self.rank = rank
        self.step = step
        self.name = name

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.Signals[self.name])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=-1)
    parser.add_argument("--step", type=int, default=-1)
    parser.add_argument("--signal", default="SIGTERM")
    parser.add_argument("--ckpt_path")
    parser.add_argument("--strategy", default="ddp")
    options = parser.parse_args()
    data = make_data(n_alignment=24, batch_size=4, harmful_batch_size=2)
    module = make_module(data=data, double=False)
    trainer = fit(
        module,
        data,
        8,
        devices=2,
        strategy=options.strategy,
        default_root_dir=str(options.out),
        ckpt_path=options.ckpt_path,
        callbacks=[Sender(options.rank, options.step, options.signal), Preemption()],
    )
    gather = getattr(trainer.strategy, "gather", torch.Tensor.detach)
    weights = [gather(p).clone() for p in module.parameters()]
    if trainer.is_global_zero:
        torch.save(weights, options.out / "weights.pt")


if __name__ == "__main__":
    main()
