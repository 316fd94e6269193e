"""Booster with Vaccine's alignment gradient."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_modules.held_booster import HeldBoosterModule
from lightning_modules.perturbation import perturbed_gradient
from lightning_modules.vaccine import checked_rho, vaccine_passes
from strategies import Vector
from temper.data import Batch
from temper.models import NetworkSpec
from temper.models.blocks import attention_blocks
from temper.plan.cost import Pass


class BoosterVaccineModule(HeldBoosterModule):
    """Booster+Vaccine (Huang et al. 2024, arXiv 2409.01586): Booster whose alignment pass is
    Vaccine's two.

        g = d f(o + e) / d w + lam * (grad h(w) - grad h(w - alpha * grad h(w) / ||grad h(w)||))

    e is Vaccine's perturbation of the attention outputs o (see `VaccineModule`), h the NLL of the
    harmful stream. Four passes per step; with ``refresh_every=k`` (see `HeldBoosterModule`)
    ``2 + 2/k``.

    Args:
        network: Where the network comes from.
        rho: L2 norm of the perturbation of a whole batch (paper of Vaccine: 2); 0 is Booster.
        refresh_every: Steps between refreshes of Booster's regulariser; 1 is the paper's.
        reduction_floor: Least gain of the simulated step that is worth attenuating, nats per token;
            None is the paper's, without a floor.
        kwargs: See `HeldBoosterModule`.
    """

    def __init__(
        self,
        network: NetworkSpec,
        rho: float = 2.0,
        refresh_every: int = 1,
        reduction_floor: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            network, refresh_every=refresh_every, reduction_floor=reduction_floor, **kwargs
        )
        self.rho = checked_rho(rho)

    def configure_model(self) -> None:
        """Build the network; refuse one whose attention blocks cannot be found."""
        super().configure_model()
        self.attention = attention_blocks(self.policy)

    def alignment_passes(self, vectors: int) -> tuple[Pass, ...]:
        """Vaccine's two, for `cost`."""
        return tuple(replace(each, vectors=vectors) for each in vaccine_passes("all"))

    def alignment_gradient(self, rows: Batch) -> tuple[Tensor, Vector, Tensor]:
        """``f(w)`` without the perturbation, Vaccine's gradient, and the norm that its perturbation
        was divided by.
        """
        found = perturbed_gradient(self, self.attention, rows, self.rho, reduced=False)
        self.log_dict(found.metrics)
        return found.loss, found.gradient, found.norm
