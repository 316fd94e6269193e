"""Follow the loss on held-out rows while training."""

from typing import Any

import lightning.pytorch as L
import torch


class ProbeLoss(L.Callback):
    """Log ``probe/<name>_loss`` (nats per token) on the datamodule's probe rows.

    During an attack, ``probe/harmful_loss`` shows how fast the model comes to carry unsafe prompts
    out, on prompts the attacker does not train on. Every rank computes it on all probe rows.

    Args:
        every_n_steps: Batches between two readings; the first is before training.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate before the batches 0, n, 2n, ..."""
        if trainer.fit_loop.epoch_loop.total_batch_idx % self.every_n_steps == 0:
            self._read(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate once more when training is over."""
        self._read(trainer, pl_module)

    @torch.no_grad()
    def _read(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = {}
        for name, rows in trainer.datamodule.probe_rows.items():  # type: ignore[attr-defined]
            rows = {key: value.to(pl_module.device) for key, value in rows.items()}
            pl_module.eval()
            with trainer.precision_plugin.forward_context():
                terms = pl_module.nll_terms(rows)  # type: ignore[operator]
            pl_module.train()
            values[f"probe/{name}_loss"] = terms.total / terms.count
        # Straight to the loggers: `log` is closed once training has ended.
        for logger in trainer.loggers:
            logger.log_metrics({k: float(v) for k, v in values.items()}, step=trainer.global_step)
