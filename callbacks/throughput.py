"""Speed and memory of training."""

import resource
import sys
import time
from typing import Any

import lightning.pytorch as L
import torch


def peak_memory_mib(device: torch.device) -> float:
    """Highest memory so far in MiB: allocated on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    scale = (
        2**20 if sys.platform == "darwin" else 2**10
    )  # ru_maxrss is in bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


class Throughput(L.Callback):
    """Log ``throughput/tokens_per_second`` and ``throughput/peak_memory_mib``, per rank.

    Tokens are those of every forward-backward pass (a Booster step has three), padding not counted.

    Args:
        every_n_steps: Optimizer steps between two readings; reading synchronises with the device.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._last = (0.0, 0, 0)  # time, tokens, batches

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._last = (time.perf_counter(), int(pl_module.work.tokens), 0)  # type: ignore[union-attr]

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the rate since the last reading."""
        since, tokens_then, batches = self._last
        if batches + 1 < self.every_n_steps:
            self._last = (since, tokens_then, batches + 1)
            return
        now, tokens = time.perf_counter(), int(pl_module.work.tokens)  # type: ignore[union-attr]
        pl_module.log("throughput/tokens_per_second", (tokens - tokens_then) / (now - since))
        pl_module.log("throughput/peak_memory_mib", peak_memory_mib(pl_module.device))
        self._last = (now, tokens, 0)
