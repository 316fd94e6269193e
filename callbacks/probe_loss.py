"""Loss on held-out rows during training."""

from typing import Any

import lightning.pytorch as L
import torch

from callbacks.evaluation import data_of, refuse_without
from temper.errors import TemperError


class ProbeLoss(L.Callback):
    """Log ``probe/<name>_loss`` (nats per token) on the datamodule's probe rows.

    During an attack, ``probe/harmful_loss`` shows how fast the model learns to carry out unsafe
    prompts that the attacker does not train on. Every rank computes it on all probe rows.

    Args:
        every_n_steps: Batches between two evaluations; the first is before training.

    Raises:
        TemperError: ``every_n_steps`` is below 1; the data have no probe rows, or the run no
            logger.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        if every_n_steps < 1:
            raise TemperError(f"ProbeLoss.every_n_steps={every_n_steps}: give at least 1")
        self.every_n_steps = every_n_steps

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse, before training, what would never be measured or never be kept."""
        if stage != "fit":
            return
        refuse_without(self, pl_module, "nll_terms")
        data = data_of(trainer)
        if not any(len(rows["input_ids"]) for rows in data.probe_rows.values()):
            raise TemperError(
                f"ProbeLoss: data={type(data).__name__} has no probe rows (probe_rows), so there is"
                " nothing to measure; use synthetic data, or drop the callback"
            )
        if not trainer.loggers:
            raise TemperError(
                "ProbeLoss: trainer.logger=false, and the losses go to the loggers alone; drop the"
                " callback, or leave trainer.logger out"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate before the batches 0, n, 2n, ..."""
        if trainer.fit_loop.epoch_loop.total_batch_idx % self.every_n_steps == 0:
            self._log_losses(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate once more after training."""
        self._log_losses(trainer, pl_module)

    @torch.no_grad()
    def _log_losses(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = {}
        for name, rows in data_of(trainer).probe_rows.items():
            rows = {key: value.to(pl_module.device) for key, value in rows.items()}
            pl_module.eval()
            with trainer.precision_plugin.forward_context():
                terms = pl_module.nll_terms(rows)  # type: ignore[operator]
            pl_module.train()
            values[f"probe/{name}_loss"] = terms.total / terms.count
        # Straight to the loggers: Lightning refuses `log` once training has ended.
        for logger in trainer.loggers:
            logger.log_metrics({k: float(v) for k, v in values.items()}, step=trainer.global_step)
