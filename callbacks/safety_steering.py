"""Steer the network away from harm while it answers."""

from typing import Any

import lightning.pytorch as L
from torch.utils.hooks import RemovableHandle

from callbacks.evaluation import refuse_without
from temper.edit.steering import add_steering, hidden_differences, steering_vectors
from temper.errors import TemperError


class SafetySteering(L.Callback):
    """Safety Arithmetic's second step (Hazra et al. 2024, arXiv 2406.11801), while answers are
    generated and at no other time.

        x' = ||x|| N(N(x) - 0.1 alpha (1 + max(0, cos(x, v))) N(v))

    x is the output of an MLP block, N the L2 normalisation, and v the layer's steering vector:
    first principal component plus mean of (unsafe - safe) hidden states over pairs of
    demonstrations, computed from the weights as they are when a validation begins. The pairs come
    from ``datamodule.steering_prompts()``: rows of two sequences (``N x 2 x T``) with ``input_ids``
    and ``attention_mask``, the unsafe demonstration first and the safe one second, the same prompt
    carried out and refused. alpha = 0 changes no bit.

    The first step, on the weights, is ``temper edit remove-harm``.

    Args:
        alpha: Strength (official code: 0.12).
        n_tokens: Tokens at the end of a demonstration whose hidden states are averaged (official
            code: 4).
    """

    def __init__(self, alpha: float = 0.12, n_tokens: int = 4) -> None:
        if alpha < 0:
            raise TemperError(
                f"SafetySteering.alpha={alpha}: give a number >= 0 (0 steers nothing; a negative"
                " one would steer towards harm)"
            )
        if n_tokens < 1:
            raise TemperError(f"SafetySteering.n_tokens={n_tokens}: give a whole number >= 1")
        self.alpha, self.n_tokens = alpha, n_tokens
        self._hooks: list[RemovableHandle] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse data without demonstrations and modules without network, before anything runs.

        Raises:
            TemperError: the datamodule has no ``steering_prompts``, or the module no ``network``.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]
        if self.alpha == 0:
            return
        refuse_without(self, pl_module, "network")
        if not hasattr(data, "steering_prompts"):
            raise TemperError(
                f"SafetySteering: data={type(data).__name__} has no steering_prompts(), which gives"
                " pairs of an unsafe and a safe demonstration; add it, or drop the callback"
            )

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Compute the vectors and begin to steer."""
        self._remove()
        if self.alpha == 0:
            return
        pairs = {
            name: rows.to(pl_module.device)
            for name, rows in trainer.datamodule.steering_prompts().items()
        }  # type: ignore[attr-defined]
        with trainer.precision_plugin.forward_context():
            differences = hidden_differences(pl_module.network, pairs, self.n_tokens)
        self._hooks = add_steering(pl_module.network, steering_vectors(differences), self.alpha)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop steering."""
        self._remove()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Stop steering whatever went wrong."""
        self._remove()

    def _remove(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
