"""Run card: settings, cost, versions and data of a run."""

import hashlib
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from torch import Tensor

from callbacks.evaluation import StreamData, data_of
from callbacks.throughput import peak_memory_mib
from temper.models.blocks import count_weights
from temper.packages import installed_version
from temper.run_folder import CARD, write_json

PACKAGES = ("temper-lm", "lightning", "torch", "transformers", "torchmetrics", "peft", "numpy")


class RunCard(L.Callback):
    """Write ``card.json``: cost (steps, passes, tokens, seconds, memory, FLOPs), versions, seed and
    data.

    ``tokens`` are those read in all forward-backward passes, of prompts and answers;
    ``trained_tokens`` those among them that have a label. Padding is in neither. FLOPs are those of
    the tokens that are read, estimated as 6 * parameters * tokens over all forward-backward passes
    plus 2 * parameters * tokens over forward-only ones (Kaplan et al. 2020), frozen parameters
    included, attention scores and padding left out. Seconds are those of training; evaluations
    during training are counted separately. Peak memory is the peak up to the first evaluation (on a
    CPU about 450 MiB of it are Python and its libraries).
    """

    def __init__(self) -> None:
        self._started = 0.0
        self._evaluating = 0.0
        self._peak: float | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()
        self._evaluating = 0.0
        self._peak = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock: the cost of an evaluation does not depend on the objective."""
        if trainer.state.fn == "fit":
            self._evaluating -= time.perf_counter()
            if self._peak is None:  # the peak never falls: later ones include generation
                self._peak = peak_memory_mib(pl_module.device)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restart the clock."""
        if trainer.state.fn == "fit":
            self._evaluating += time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the card on the first rank; counts are summed over ranks."""
        seconds = time.perf_counter() - self._started - self._evaluating
        work: Any = pl_module.work

        def total(count: Tensor) -> int:
            here = count.to(pl_module.device).double()
            return int(trainer.strategy.reduce(here, reduce_op="sum"))

        tokens = total(work.tokens)
        trained_tokens = total(work.trained_tokens)
        forward_tokens = total(work.forward_tokens)
        if not trainer.is_global_zero:
            return
        n_parameters = count_weights(pl_module.parameters())
        cost = {
            "steps": trainer.global_step,
            "skipped_steps": pl_module.skipped_steps,
            "passes": work.passes,
            "tokens": tokens,
            "trained_tokens": trained_tokens,
            "forwards": work.forwards,
            "forward_tokens": forward_tokens,
            "seconds": round(seconds, 3),
            "evaluation_seconds": round(self._evaluating, 3),
            "peak_memory_mib": round(self._peak or peak_memory_mib(pl_module.device), 1),
            "flops": n_parameters * (6 * tokens + 2 * forward_tokens),
        }
        card = _card(trainer, pl_module, cost, n_parameters)
        write_json(Path(trainer.default_root_dir) / CARD, card)


def _card(
    trainer: L.Trainer, pl_module: L.LightningModule, cost: dict[str, Any], n_parameters: int
) -> dict[str, Any]:
    """The content of ``card.json``."""
    data = data_of(trainer)
    versions = {name: installed_version(name) for name in PACKAGES}
    return {
        "objective": type(pl_module).__name__,
        "data": type(data).__name__,
        "cost": cost,
        "parameters": n_parameters,
        "trainable_parameters": count_weights(p for p in pl_module.parameters() if p.requires_grad),
        "devices": trainer.world_size,
        "precision": str(trainer.precision),
        "seed": int(os.environ.get("PL_GLOBAL_SEED", "-1")),
        "data_rows": _n_rows(data),
        "data_sha256": data.fingerprints(),
        "code": _code_version(),
        "versions": versions | {"python": platform.python_version()},
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "device": str(pl_module.device),
        },
    }


def _n_rows(data: StreamData) -> dict[str, int]:
    """Numbers of rows of every stream (of one pass, if a stream is endless) and of evaluation
    prompts.
    """
    rows = {
        name: getattr(source, "n_rows", source.batches_per_pass * source.batch_size)
        for name, source in data.sources.items()
    }
    return rows | {"eval": len(data.eval_rows["ids"])}


def _code_version() -> str:
    """Commit of the code, marked if the working tree differs from it; without git, a hash of the
    Python files.
    """
    root = Path(__file__).parent.parent
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
        return f"{commit}-modified" if changed else commit
    except (OSError, subprocess.CalledProcessError):
        digest = hashlib.sha256()
        for path in sorted(root.glob("*/**/*.py")):
            digest.update(path.read_bytes())
        return f"sha256:{digest.hexdigest()[:16]}"


def _git(root: Path, *words: str) -> str:
    command = ("git", "-C", str(root), *words)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
