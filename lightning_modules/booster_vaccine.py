"""Booster with Vaccine's alignment gradient."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_modules.booster import BoosterModule
from lightning_modules.perturbation import perturbed_gradient
from lightning_modules.vaccine import checked_rho, vaccine_passes
from strategies import Vector
from temper.data import Batch
from temper.models import NetworkSpec
from temper.models.blocks import attention_blocks
from temper.plan.cost import Pass


class BoosterVaccineModule(BoosterModule):
    """Booster+Vaccine (Huang et al. 2024, arXiv 2409.01586): Booster whose alignment pass is
    Vaccine's two.

        g = d f(o + e) / d w + lam * (grad h(w) - grad h(w - alpha * grad h(w) / ||grad h(w)||))

    e is Vaccine's perturbation of the attention outputs o (see `VaccineModule`), h the NLL of the
    harmful stream. Four passes per step, or ``2 + 2/k`` with ``refresh_every=k``.

    Args:
        network: Where the network comes from.
        rho: L2 norm of the perturbation of a whole batch (paper of Vaccine: 2); 0 is Booster.
        kwargs: See `BoosterModule`.
    """

    def __init__(self, network: NetworkSpec, rho: float = 2.0, **kwargs: Any) -> None:
        super().__init__(network, **kwargs)
        self.rho = checked_rho(rho)

    def configure_model(self) -> None:
        """Build the network; refuse one whose attention blocks cannot be found."""
        super().configure_model()
        assert self.network is not None
        self.attention = attention_blocks(self.network)

    def alignment_passes(self, vectors: int) -> tuple[Pass, ...]:
        """Vaccine's two, for `cost`."""
        return tuple(replace(each, vectors=vectors) for each in vaccine_passes("all"))

    def alignment_gradient(self, rows: Batch) -> tuple[Tensor, Vector, Tensor]:
        """``f(w)`` without the perturbation, Vaccine's gradient, and the norm that its perturbation
        was divided by.
        """
        found = perturbed_gradient(self, self.attention, rows, self.rho, reduced=False)
        self.log_dict(found.figures)
        return found.loss, found.gradient, found.norm
