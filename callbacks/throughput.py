"""Tokens per second and peak memory of training."""

import resource
import sys
import time
from typing import Any

import lightning.pytorch as L
import torch

from temper.errors import TemperError

RATES = ("tokens_per_second", "trained_tokens_per_second")


def peak_memory_mib(device: torch.device) -> float:
    """Highest memory so far in MiB: allocated on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss: bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class Throughput(L.Callback):
    """Log ``throughput/tokens_per_second``, ``throughput/trained_tokens_per_second`` and
    ``throughput/peak_memory_mib``, per rank.

    Tokens are those read in every forward-backward pass (a Booster step has three), of prompts and
    answers, without padding; trained ones are those among them that have a label.

    Args:
        every_n_steps: Optimizer steps between two measurements; each one synchronizes with the
            device.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise TemperError(f"Throughput.every_n_steps={every_n_steps}: give at least 1")
        self.every_n_steps = every_n_steps
        self._since = 0.0
        self._counted = (0, 0)
        self._batches = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._restart(time.perf_counter(), _tokens(pl_module))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the rate since the last measurement."""
        self._batches += 1
        if self._batches < self.every_n_steps:
            return
        now = time.perf_counter()
        counted = _tokens(pl_module)
        for name, count, earlier in zip(RATES, counted, self._counted, strict=True):
            pl_module.log(f"throughput/{name}", (count - earlier) / (now - self._since))
        pl_module.log("throughput/peak_memory_mib", peak_memory_mib(pl_module.device))
        self._restart(now, counted)

    def _restart(self, now: float, counted: tuple[int, int]) -> None:
        self._since = now
        self._counted = counted
        self._batches = 0


def _tokens(pl_module: L.LightningModule) -> tuple[int, int]:
    """Tokens read and tokens trained so far."""
    work: Any = pl_module.work
    return int(work.tokens), int(work.trained_tokens)
