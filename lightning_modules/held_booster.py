"""Booster with its regulariser held for several steps, and a floor under the gain it attenuates."""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.booster import BoosterModule
from strategies import Vector
from temper.data import Batch
from temper.errors import TemperError
from temper.models import NetworkSpec
from temper.plan.cost import Cost, Pass


class HeldBoosterModule(BoosterModule):
    """Booster (see `BoosterModule`) at half the extra cost, and without its overshoot.

        w' = w - alpha * grad h(w) / ||grad h(w)||
        r  = lam * (grad h(w) - grad h(w')) if h(w) - h(w') > floor, else 0
        g  = grad f(w) + r,  r computed every k steps and held in between

    ``refresh_every=k`` holds r for k steps: ``1 + 2/k`` passes per step on average, and one extra
    copy of the trainable weights.

    ``reduction_floor`` minimises ``f(w) + lam * max(h(w) - h(w'), floor)``: the regulariser is off
    where the simulated step gains less than that. Without a floor the objective is unbounded below.
    How the defaults were found is in docs/log.md.

    Args:
        network: Where the network comes from.
        lam: Weight of the regulariser.
        alpha: Length of the simulated harmful step, L2 norm over all trainable weights.
        refresh_every: k, steps between refreshes of the regulariser; 1 refreshes at every step.
        reduction_floor: Least gain of the simulated step, in nats per token, that is worth
            attenuating; None is no floor.
        kwargs: See `ObjectiveModule`.

    Raises:
        TemperError: a number outside its range.
    """

    def __init__(
        self,
        network: NetworkSpec,
        lam: float = 5.0,
        alpha: float = 0.1,
        refresh_every: int = 4,
        reduction_floor: float | None = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, lam, alpha, **kwargs)
        if refresh_every < 1:
            raise TemperError(
                f"model.init_args.refresh_every={refresh_every}: give a whole number >= 1"
            )
        self.refresh_every = refresh_every
        self.reduction_floor = reduction_floor
        self.held_for = 0  # steps that the held regulariser has been used for

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> None:
        """One step, with a fresh or the held regulariser; logs the losses of its passes."""
        held = self.kept.get("held")
        if held is None or self.held_for >= self.refresh_every:
            regulariser, norm = self._fresh_regulariser(batch["harmful"])
            held_for = 0
        else:
            regulariser = held
            norm = torch.zeros((), device=self.device)
            held_for = self.held_for
        loss, gradient, *norms = self.alignment_gradient(batch["alignment"])
        gradient.add_(regulariser)
        # A held regulariser is the mean over ranks already, and the mean of equal vectors is that
        # vector.
        taken = self.apply_gradient(self.weights.reduce(gradient), norm, *norms)
        self.log("loss/alignment", loss, prog_bar=True)
        if not taken and held_for == 0:  # it may be what was not finite
            self.kept.pop("held", None)
        elif self.refresh_every > 1:
            self.kept["held"] = regulariser
            self.held_for = held_for + 1

    def _fresh_regulariser(self, harmful: Batch) -> tuple[Vector, Tensor]:
        """``r``, the same on every rank if it is going to be held, and ``||grad h(w)||``."""
        harmful_loss, harmful_grad = self.gradient(harmful)
        norm = self.weights.norm(harmful_grad)
        with self.weights.displaced(harmful_grad, self.displacement_scale(norm)):
            perturbed_loss, perturbed_grad = self.gradient(harmful, reduced=False)
        weight: float | Tensor = self.lam
        if self.reduction_floor is not None:
            weight = self.lam * (harmful_loss - perturbed_loss > self.reduction_floor)
        regulariser = harmful_grad.sub_(perturbed_grad).mul_(weight)
        self.log_passes(harmful_loss, perturbed_loss, norm)
        return self.weights.reduce(regulariser) if self.refresh_every > 1 else regulariser, norm

    def cost(self) -> Cost:
        """Both harmful passes in a step that refreshes, then the alignment pass."""
        held = int(self.refresh_every > 1)  # the old regulariser, until the new one replaces it
        share = 1 / self.refresh_every
        harmful = (
            Pass("harmful", share, vectors=held),
            Pass("harmful", share, vectors=held + 1, displaced=True),
        )
        # The alignment gradient and the sum are one vector, except where reducing makes a new one.
        reductions = 1 + share * (1 + held)
        passes = (*harmful, *self.alignment_passes(1 + held))
        return Cost(passes, vectors=1 + held, unreduced=1, reductions=reductions)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the age of the held regulariser."""
        super().on_save_checkpoint(checkpoint)
        if "held" in self.kept:
            checkpoint["booster"] = {"held_for": self.held_for}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it, so that a resumed run refreshes when the uninterrupted one would."""
        super().on_load_checkpoint(checkpoint)
        if "held" in self.kept:
            self.held_for = checkpoint["booster"]["held_for"]
