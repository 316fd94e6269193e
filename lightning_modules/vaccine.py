"""Vaccine: alignment that holds under perturbed hidden embeddings."""

from typing import Any, Literal

from lightning_modules.base import ObjectiveModule
from lightning_modules.perturbation import perturbed_gradient
from temper.data import Batch
from temper.errors import TemperError
from temper.models import NetworkSpec
from temper.models.blocks import attention_blocks
from temper.plan.cost import Cost, Pass


class VaccineModule(ObjectiveModule):
    """Vaccine (Huang et al. 2024, arXiv 2402.01109, algorithm 1).

        g_l = d f / d o_l,    e_l = rho * g_l / ||(g_1, ..., g_L)||,    step along d f(o + e) / d w

    f is the NLL of the alignment stream, ``o_l`` the output of the attention block of layer l. The
    norm is global over layers, rows, tokens, micro-batches and ranks; e is a constant in the second
    pass. Two passes per step, the first without weight gradients.

    Args:
        network: Where the network comes from.
        rho: L2 norm of the perturbation of a whole batch (paper: 2); 0 is SFT.
        kwargs: See `ObjectiveModule`.
    """

    streams: tuple[str, ...] | None = ("alignment",)

    def __init__(self, network: NetworkSpec, rho: float = 2.0, **kwargs: Any) -> None:
        super().__init__(network, **kwargs)
        self.rho = checked_rho(rho)

    def configure_model(self) -> None:
        """Build the network; refuse one whose attention blocks cannot be found."""
        super().configure_model()
        self.attention = attention_blocks(self.policy)

    def cost(self) -> Cost:
        """The pass that finds the perturbation, and the one under it."""
        return Cost(vaccine_passes("all"))

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> None:
        """Two passes over the same rows; logs the losses of both, of the first as
        ``loss/alignment``.
        """
        found = perturbed_gradient(self, self.attention, batch["alignment"], self.rho)
        self.apply_gradient(found.gradient, found.norm)
        self.log("loss/alignment", found.loss, prog_bar=True)
        self.log_dict(found.metrics)


def vaccine_passes(blocks: int | Literal["all"]) -> tuple[Pass, ...]:
    """The two passes of `perturbed_gradient` over the alignment stream, for `cost`; output
    gradients are held between them.
    """
    return (
        Pass("alignment", gradient="outputs", outputs=blocks),
        Pass("alignment", outputs=blocks),
    )


def checked_rho(rho: float) -> float:
    """Rho itself.

    Raises:
        TemperError: it is negative.
    """
    if not rho >= 0:
        raise TemperError(f"model.init_args.rho={rho}: give a number >= 0 (0 perturbs nothing)")
    return rho
