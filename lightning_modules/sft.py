"""Supervised fine-tuning: safety training, and the attacker's fine-tuning alike."""

from lightning_modules.base import ObjectiveModule
from temper.data import Batch


class SFTModule(ObjectiveModule):
    """Minimise the mean NLL of the response tokens, ``-sum log p(y_t | x, y_<t) / n_tokens``.

    On an alignment set (refusals to unsafe prompts, answers to safe ones) this is supervised safety
    fine-tuning; on a user's rows of which a share is harmful it is the fine-tuning attack.
    """

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> None:
        """One step on the datamodule's primary stream; logs ``loss/<stream>``."""
        ((stream, rows),) = batch.items()
        loss, gradient = self.gradient(rows)
        self.apply_gradient(gradient)
        self.log(f"loss/{stream}", loss, prog_bar=True)
