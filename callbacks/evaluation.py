"""What callbacks that evaluate share: a word when a fit ends without an evaluation."""

import lightning.pytorch as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class EvaluationCallback(L.Callback):
    """Base of callbacks that measure at validation; they set ``evaluated`` when they have."""

    def __init__(self) -> None:
        self.evaluated = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget evaluations of earlier fits."""
        self.evaluated = False

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if nothing was evaluated: Lightning skips validation that is due after the last step in silence."""
        if not self.evaluated:
            rank_zero_warn(
                f"{type(self).__name__}: nothing was evaluated in this fit; give --trainer.val_check_interval (at most the number of "
                "steps), or run `validate` on the export"
            )
