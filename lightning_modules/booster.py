"""Booster: attenuate the gain of a harmful fine-tuning step."""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.base import ObjectiveModule
from strategies import Vector
from temper.data import Batch
from temper.errors import TemperError
from temper.models import NetworkSpec
from temper.plan.cost import Cost, Pass


class BoosterModule(ObjectiveModule):
    """Booster (Huang et al. 2024, arXiv 2409.01586, equation 3 and algorithm 1), first order.

        g = grad f(w) + lam * (grad h(w) - grad h(w - alpha * grad h(w) / ||grad h(w)||))

    f is the NLL of the alignment stream, h that of the harmful stream, the norm is global over all
    trainable weights. The displacement is a constant: no second derivatives. Three
    forward-backward passes per step, two gradient all-reduces under DDP.

    The objective is unbounded below, since h(w') may grow for ever: in a long run at a high rate it
    makes the loss surface so rough that a step of length alpha overshoots, which stops no
    attacker. `HeldBoosterModule` has a floor against that, and costs half as many extra passes.

    Args:
        network: Where the network comes from.
        lam: Weight of the regulariser (paper: 5).
        alpha: Length of the simulated harmful step, L2 norm over all trainable weights (paper:
            0.1).
        kwargs: See `ObjectiveModule`.

    Raises:
        TemperError: a negative number.
    """

    streams = ("alignment", "harmful")

    def __init__(
        self, network: NetworkSpec, lam: float = 5.0, alpha: float = 0.1, **kwargs: Any
    ) -> None:
        super().__init__(network, **kwargs)
        for flag, value in (("lam", lam), ("alpha", alpha)):
            if not value >= 0:
                raise TemperError(
                    f"model.init_args.{flag}={value}: give a number >= 0 (0 is plain SFT)"
                )
        self.lam = lam
        self.alpha = alpha

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> None:
        """One Booster step; logs the losses of its three passes."""
        harmful_loss, harmful_grad = self.gradient(batch["harmful"])  # pass 1, at w
        norm = self.weights.norm(harmful_grad)
        with self.weights.displaced(harmful_grad, self.displacement_scale(norm)):
            perturbed_loss, perturbed_grad = self.gradient(batch["harmful"], reduced=False)  # 2
        loss, gradient, *norms = self.alignment_gradient(batch["alignment"])  # pass 3, at w again
        gradient.add_(harmful_grad.sub_(perturbed_grad).mul_(self.lam))
        # Passes 2 and 3 left each rank its own gradient (reduced=False). That of pass 1 is the mean
        # over ranks already, and the mean of equal vectors is that vector: so one all-reduce of the
        # sum is the mean of every term, and a step all-reduces two gradients instead of three.
        self.apply_gradient(self.weights.reduce(gradient), norm, *norms)
        self.log("loss/alignment", loss, prog_bar=True)
        self.log_passes(harmful_loss, perturbed_loss, norm)

    def displacement_scale(self, norm: Tensor) -> Tensor:
        """Factor of the harmful gradient that makes a step of length alpha downhill; a gradient of
        exactly zero displaces nothing.
        """
        return -self.alpha / norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def alignment_gradient(self, rows: Batch) -> tuple[Tensor, Vector, *tuple[Tensor, ...]]:
        """``f(w)``, its gradient (not reduced yet), and norms that must be finite for a step.

        Methods that combine Booster with another alignment loss override this.
        """
        return self.gradient(rows, reduced=False)

    def log_passes(self, harmful_loss: Tensor, perturbed_loss: Tensor, norm: Tensor) -> None:
        """Log the harmful losses before and after the simulated step, and its gradient's norm."""
        metrics = {
            "booster/harmful_before": harmful_loss,
            "booster/harmful_after": perturbed_loss,
            "booster/reduction": harmful_loss - perturbed_loss,
            "booster/harmful_grad_norm": norm,
        }
        if self.weights.displacement_cosine is not None:  # of the first displacement
            metrics["booster/displacement_cosine"] = self.weights.displacement_cosine
        self.log_dict(metrics)

    def cost(self) -> Cost:
        """Both harmful passes, then the alignment pass."""
        harmful = (Pass("harmful"), Pass("harmful", vectors=1, displaced=True))
        return Cost((*harmful, *self.alignment_passes(1)), vectors=1, unreduced=1, reductions=2)

    def alignment_passes(self, vectors: int) -> tuple[Pass, ...]:
        """The passes of `alignment_gradient`, for `cost`."""
        return (Pass("alignment", vectors=vectors),)
