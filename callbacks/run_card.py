"""Run card: settings, cost, versions and data of a run."""

import hashlib
import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from torch import Tensor

from callbacks.evaluation import StreamData, data_of
from callbacks.throughput import peak_memory_mib
from temper.models.blocks import count_weights
from temper.packages import installed_version
from temper.run_folder import CARD, write_json

SEGMENTS = "segments"  # key of the card, and of a checkpoint
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

    A run that was interrupted and resumed has several ``segments``, each with its first and last
    step, seconds, devices and versions; seconds are summed over them, and the peak is the largest.
    Steps that were trained after the checkpoint that a run was resumed from are in no segment.
    """

    def __init__(self) -> None:
        self._earlier: list[dict[str, Any]] = []
        self._first_step = 0
        self._began = ""
        self._started = 0.0
        self._evaluating = 0.0
        self._peak: float | None = None
        self._code = ""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        self._earlier = []
        self._first_step = 0

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the segments up to this step."""
        checkpoint[SEGMENTS] = [*self._earlier, self._segment(trainer, pl_module)]

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on after the segments of a checkpoint."""
        if trainer.state.fn == "fit":
            self._earlier = list(checkpoint.get(SEGMENTS, []))
            self._first_step = checkpoint["global_step"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._began = datetime.now(UTC).isoformat(timespec="seconds")
        self._started = time.perf_counter()
        self._evaluating = 0.0
        self._peak = None
        self._code = _code_version()

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
        segments = [*self._earlier, self._segment(trainer, pl_module)]
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
            "seconds": round(sum(each["seconds"] for each in segments), 3),
            "evaluation_seconds": round(sum(each["evaluation_seconds"] for each in segments), 3),
            "peak_memory_mib": max(each["peak_memory_mib"] for each in segments),
            "flops": n_parameters * (6 * tokens + 2 * forward_tokens),
        }
        card = _card(trainer, pl_module, cost, n_parameters) | {SEGMENTS: segments}
        write_json(Path(trainer.default_root_dir) / CARD, card)

    def _segment(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The part of the run since this process began."""
        now = time.perf_counter()
        # While an evaluation runs, its start is subtracted already (on_validation_start).
        evaluating = self._evaluating + (now if self._evaluating < 0 else 0.0)
        return {
            "began": self._began,
            "first_step": self._first_step,
            "last_step": trainer.global_step,
            "resumed_from": str(trainer.ckpt_path) if trainer.ckpt_path else None,
            "seconds": round(now - self._started - evaluating, 3),
            "evaluation_seconds": round(evaluating, 3),
            "peak_memory_mib": round(self._peak or peak_memory_mib(pl_module.device), 1),
            "devices": trainer.world_size,
            "device": str(pl_module.device),
            "code": self._code,
            "versions": _versions(),
        }


def _card(
    trainer: L.Trainer, pl_module: L.LightningModule, cost: dict[str, Any], n_parameters: int
) -> dict[str, Any]:
    """The content of ``card.json``."""
    data = data_of(trainer)
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
        "versions": _versions(),
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "device": str(pl_module.device),
        },
    }


def _versions() -> dict[str, str]:
    versions = {name: installed_version(name) for name in PACKAGES}
    return versions | {"python": platform.python_version()}


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
