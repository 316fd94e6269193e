"""Trains every objective for three steps under several strategies; started by
test_every_objective_distributed.py, alone or by torchrun.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import torch

torch.set_num_threads(1)

from datamodules.base import StreamDataModule  # noqa: E402
from lightning_modules import ObjectiveModule  # noqa: E402
from temper.errors import TemperError  # noqa: E402
from tests.objective_cases import CASES, PERTURBING, Case  # noqa: E402
from tests.objectives import fit, make_module  # noqa: E402


def train(
    case: Case, strategy: str, single: bool, micro_batch_size: int | None, folder: Path
) -> list[torch.Tensor] | str:
    """Train a case; returns its whole weights, or the message if the strategy was refused.

    ``ddp+resume`` interrupts after two steps and resumes in a new module.
    """
    strategy, _, resume = strategy.partition("+")
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {"devices": devices, "strategy": strategy if devices > 1 else "auto"}
    try:
        checkpoint = None
        if resume:
            checkpoint = str(folder / f"{strategy}-{case}.ckpt")
            fit(*make(case, single, micro_batch_size), 2, **settings).save_checkpoint(checkpoint)
        module, data = make(case, single, micro_batch_size)
        trainer = fit(module, data, 3, checkpoint, **settings)
    except TemperError as refusal:
        return str(refusal)
    gather = getattr(trainer.strategy, "gather", torch.Tensor.detach)
    return [gather(parameter).clone() for parameter in module.parameters()]


def make(
    case: Case, single: bool, micro_batch_size: int | None
) -> tuple[ObjectiveModule, StreamDataModule]:
    """A new module and its data."""
    data = case.make_data()
    size = None if case.batch_statistic else micro_batch_size
    optimizer = partial(torch.optim.AdamW, lr=1e-2, eps=1e-3)
    module = make_module(
        case.kind,
        data,
        max_grad_norm=0.5,
        micro_batch_size=size,
        optimizer=optimizer,
        **case.settings,
    )
    if single:
        module.network.float()
    return module, data


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--micro_batch_size", type=int)
    parser.add_argument("--strategies", nargs="+", default=["auto"])
    parser.add_argument(
        "--single",
        nargs="*",
        default=[],
        help="strategies that train in float32, the most precise that they support",
    )
    parser.add_argument(
        "--perturbing",
        nargs="*",
        default=[],
        help="strategies that train only the objectives that perturb weights",
    )
    options = parser.parse_args()
    results = {
        f"{strategy}: {case}": train(
            case, strategy, strategy in options.single, options.micro_batch_size, options.out.parent
        )
        for strategy in options.strategies
        for case in (PERTURBING if strategy in options.perturbing else CASES)
    }
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(results, options.out)


if __name__ == "__main__":
    main()
