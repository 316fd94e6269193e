"""Booster: attenuate what a harmful fine-tuning step can gain."""

from typing import Any, ClassVar

import torch

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

    ``refresh_every=k`` holds ``lam * (grad h(w) - grad h(w'))`` for k steps: ``1 + 2/k`` passes per
    step on average, and one extra copy of the trainable weights. k = 1 is Booster.

    ``reduction_floor=r`` minimises ``f(w) + lam * max(h(w) - h(w'), r)`` instead: the regulariser
    is off where the simulated step gains less than r. Without a floor the objective is unbounded
    below, since h(w') may grow for ever, and a long enough run finds that out: it makes the loss
    surface so rough that a step of length alpha overshoots, which stops no attacker.

    Args:
        network: Where the network comes from.
        lam: Weight of the regulariser (paper: 5).
        alpha: Length of the simulated harmful step, L2 norm over all trainable weights (paper:
            0.1).
        refresh_every: Steps between refreshes of the regulariser's gradient.
        reduction_floor: Least gain of the simulated step, in nats per token, that is worth
            attenuating; None is the paper's objective, without a floor.
        kwargs: See `ObjectiveModule`.
    """

    streams: ClassVar = ("alignment", "harmful")

    def __init__(
        self,
        network: NetworkSpec,
        lam: float = 5.0,
        alpha: float = 0.1,
        refresh_every: int = 1,
        reduction_floor: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, **kwargs)
        for flag, value in (("lam", lam), ("alpha", alpha)):
            if not value >= 0:
                raise TemperError(
                    f"model.init_args.{flag}={value}: give a number >= 0 (0 is plain SFT)"
                )
        if refresh_every < 1:
            raise TemperError(
                f"model.init_args.refresh_every={refresh_every}: give a whole number >= 1 (1 is"
                " Booster)"
            )
        self.lam, self.alpha, self.refresh_every, self.reduction_floor = (
            lam,
            alpha,
            refresh_every,
            reduction_floor,
        )
        self.held: Vector | None = None
        self.held_for = 0

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> None:
        """One Booster step; logs the losses of its three passes."""
        fresh = self.held is None or self.held_for >= self.refresh_every
        regulariser, harmful_norm = (
            self._regulariser(batch["harmful"])
            if fresh
            else (self.held, torch.zeros((), device=self.device))
        )
        assert regulariser is not None
        loss, alignment_grad, *norms = self.alignment_gradient(batch["alignment"])
        taken = self.apply_gradient(
            self.weights.reduce(alignment_grad.add_(regulariser)), harmful_norm, *norms
        )
        self.log("loss/alignment", loss, prog_bar=True)
        if not taken and fresh:
            self.held = None
        elif self.refresh_every > 1:
            self.held, self.held_for = regulariser, 1 if fresh else self.held_for + 1

    def cost(self) -> Cost:
        """Both harmful passes, then the alignment pass, in a step that refreshes."""
        held = int(
            self.refresh_every > 1
        )  # the regulariser of earlier steps, until the new one takes its place
        often = 1 / self.refresh_every
        harmful = (
            Pass("harmful", often, vectors=held),
            Pass("harmful", often, vectors=held + 1, displaced=True),
        )
        # The alignment gradient and the sum are the same vector, but where reducing makes a new
        # one.
        reductions = 1 + often * (1 + held)
        return Cost(
            (*harmful, *self.alignment_passes(1 + held)),
            vectors=1 + held,
            unreduced=1,
            reductions=reductions,
        )

    def alignment_passes(self, vectors: int) -> tuple[Pass, ...]:
        """The passes of `alignment_gradient`, for `cost`."""
        return (Pass("alignment", vectors=vectors),)

    def alignment_gradient(self, rows: Batch) -> tuple[Any, ...]:
        """``f(w)``, its gradient (not reduced over ranks yet), and norms that must be finite;
        combined methods put theirs here.
        """
        return self.gradient(rows, reduced=False)

    def _regulariser(self, harmful: Batch) -> tuple[Vector, torch.Tensor]:
        """``lam * (grad h(w) - grad h(w'))``, and ``||grad h(w)||``."""
        harmful_loss, harmful_grad = self.gradient(harmful)
        norm = self.weights.norm(harmful_grad)
        # A harmful gradient of exactly zero displaces nothing, instead of dividing by zero.
        with self.weights.displaced(
            harmful_grad, -self.alpha / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        ):
            perturbed_loss, perturbed_grad = self.gradient(harmful, reduced=False)
        reduction = harmful_loss - perturbed_loss
        weight = (
            self.lam
            if self.reduction_floor is None
            else self.lam * (reduction > self.reduction_floor)
        )
        regulariser = harmful_grad.sub_(perturbed_grad).mul_(weight)
        if self.refresh_every > 1:  # what outlives the step must be the same on every rank
            regulariser = self.weights.reduce(regulariser)
        figures = {
            "booster/harmful_before": harmful_loss,
            "booster/harmful_after": perturbed_loss,
            "booster/reduction": reduction,
            "booster/harmful_grad_norm": norm,
        }
        if self.weights.displacement_cosine is not None:  # of the first displacement
            figures["booster/displacement_cosine"] = self.weights.displacement_cosine
        self.log_dict(figures)
        return regulariser, norm

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the held gradient and its age."""
        super().on_save_checkpoint(checkpoint)
        if self.held is not None:
            checkpoint["booster"] = {"held_for": self.held_for}
            checkpoint["vectors"] = {"held": dict(zip(self.weights.names, self.held, strict=True))}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the held gradient up again, so that a resumed run refreshes when it would have."""
        super().on_load_checkpoint(checkpoint)
        if held := checkpoint.get("vectors", {}).get(
            "held"
        ):  # an evaluation under FSDP2 or ZeRO reads no vectors
            self.held, self.held_for = (
                Vector(list(held.values())),
                checkpoint["booster"]["held_for"],
            )

    def on_train_start(self) -> None:
        """Put a held gradient that was read from a checkpoint where the weights are: the module is
        moved after it is read.
        """
        super().on_train_start()
        if self.held is not None:
            self.held = self.held.to(self.device)
