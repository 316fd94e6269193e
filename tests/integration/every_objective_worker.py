"""Trains every objective for three steps; started by test_every_objective_ddp.py, alone or by torchrun."""

import argparse
import os
from functools import partial
from pathlib import Path

import torch

torch.set_num_threads(1)

from temper.errors import TemperError  # noqa: E402
from tests.objective_cases import CASES  # noqa: E402
from tests.objectives import fit, make_module  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--micro_batch_size", type=int)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--single", action="store_true", help="float32: DeepSpeed has no other")
    options = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    results: dict[str, list[torch.Tensor] | str] = {}
    for case in CASES:
        data = case.make_data()
        size = None if case.batch_statistic else options.micro_batch_size
        optimizer = partial(torch.optim.AdamW, lr=1e-2, eps=1e-3)
        torch.manual_seed(7)
        module = make_module(case.kind, data, max_grad_norm=0.5, micro_batch_size=size, optimizer=optimizer, **case.settings)
        try:
            if options.single:
                module.network.float()
            trainer = fit(module, data, 3, devices=ranks, strategy=options.strategy if ranks > 1 else "auto")
            gather = getattr(trainer.strategy, "gather", torch.Tensor.detach)
            results[str(case)] = [gather(p).clone() for p in module.parameters()]
        except TemperError as refusal:
            results[str(case)] = str(refusal)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(results, options.out)


if __name__ == "__main__":
    main()
