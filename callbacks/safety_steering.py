"""Activation steering away from harm while answers are generated."""

from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as L
from torch.utils.hooks import RemovableHandle

from callbacks.evaluation import EvaluationCallback, data_of, refuse_without
from temper.data import Batch
from temper.edit.steering import add_steering, hidden_differences, steering_vectors
from temper.errors import TemperError


@runtime_checkable
class SteeringPairs(Protocol):
    """A datamodule that has demonstrations to steer by."""

    def steering_pairs(self) -> Batch:
        """Rows of two sequences (``N x 2 x T``) with ``input_ids`` and ``attention_mask``: the same
        prompt carried out (the unsafe demonstration) and refused (the safe one).
        """
        ...


class SafetySteering(EvaluationCallback):
    """Steer MLP outputs away from harm while answers are generated, and at no other time: the
    second step of Safety Arithmetic (Hazra et al. 2024, arXiv 2406.11801).

        x' = ||x|| N(N(x) - 0.1 alpha (1 + max(0, cos(x, v))) N(v))

    x is the output of an MLP block, N the L2 normalization, and v the layer's steering vector:
    first principal component plus mean of (unsafe - safe) hidden states over pairs of
    demonstrations, computed from the weights as they are when a validation begins. The pairs come
    from the datamodule (`SteeringPairs`). With alpha = 0 nothing is steered, and answers are the
    same bit for bit.

    The first step, on the weights, is ``temper edit remove-harm``.

    Args:
        alpha: Strength (official code: 0.12).
        n_tokens: Tokens at the end of a demonstration whose hidden states are averaged (official
            code: 4).
    """

    def __init__(self, alpha: float = 0.12, n_tokens: int = 4) -> None:
        super().__init__()
        if alpha < 0:
            raise TemperError(
                f"SafetySteering.alpha={alpha}: give a number >= 0 (0 steers nothing; a negative"
                " one would steer towards harm)"
            )
        if n_tokens < 1:
            raise TemperError(f"SafetySteering.n_tokens={n_tokens}: give a whole number >= 1")
        self.alpha = alpha
        self.n_tokens = n_tokens
        self._hooks: list[RemovableHandle] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse, before anything runs, data without demonstrations and modules without network.

        Raises:
            TemperError: the datamodule has no ``steering_pairs``, or the module no ``network``.
        """
        if self.alpha == 0:
            return
        refuse_without(self, pl_module, "network")
        _steering_data(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Compute the steering vectors and start to steer."""
        self._remove()
        self.evaluated = True
        if self.alpha == 0:
            return
        rows = _steering_data(trainer).steering_pairs()
        pairs = {name: value.to(pl_module.device) for name, value in rows.items()}
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
        """Stop steering after any error."""
        self._remove()

    def _remove(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()


def _steering_data(trainer: L.Trainer) -> SteeringPairs:
    data = data_of(trainer)
    if not isinstance(data, SteeringPairs):
        raise TemperError(
            f"SafetySteering: data={type(data).__name__} has no steering_pairs(), which gives"
            " pairs of an unsafe and a safe demonstration; add it, or drop the callback"
        )
    return data
