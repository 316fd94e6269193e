"""KTO: preference optimisation over single answers marked desirable or undesirable."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_modules.reference import PreferenceModule
from temper.data import Batch, sequence
from temper.errors import TemperError
from temper.losses import MeanTerms, mean_of
from temper.losses.kto import kto_losses, reference_point
from temper.models import NetworkSpec
from temper.plan.cost import Cost, Pass


class KTOModule(PreferenceModule):
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306, equation 8).

        loss = mean over rows of  w_d (1 - sigma(b (c - z)))  if desirable,  w_u (1 - sigma(b (z -
        r)))  if not z    = max(0, mean over rows of l(y'|x) - l_ref(y'|x)),  y' the answer of
        another row

    c and r are ``l(y|x) - l_ref(y|x)`` of the row's answer. z estimates ``KL(policy || reference)``
    over the whole batch, all micro-batches and ranks, before any gradient is taken, and is a
    constant; so micro-batches change nothing. It costs a forward pass of the policy and one of the
    reference over the mismatched answers. A row holds two sequences: its own answer, and its prompt
    with the answer of another row; the flag ``desirable`` is of the first. Dropout is off.

    Args:
        network: Where the network comes from.
        beta: Scale of the log-probability ratios.
        w_desirable: Weight of desirable rows. The paper asks for ``w_d n_d / (w_u n_u)`` in [1,
            4/3].
        w_undesirable: Weight of undesirable rows.
        kwargs: See `ReferenceModule`.
    """

    streams = ("kto",)

    def __init__(
        self,
        network: NetworkSpec,
        beta: float = 0.1,
        w_desirable: float = 1.0,
        w_undesirable: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, **kwargs)
        if not beta > 0:
            raise TemperError(f"model.init_args.beta={beta}: give a number > 0")
        for flag, value in (("w_desirable", w_desirable), ("w_undesirable", w_undesirable)):
            if not value >= 0:
                raise TemperError(f"model.init_args.{flag}={value}: give a weight >= 0")
        self.beta = beta
        self.w_desirable = w_desirable
        self.w_undesirable = w_undesirable
        self.read_reference("sums", self.streams)

    def cost(self) -> Cost:
        """Own and mismatched answers by the reference, mismatched ones by the policy, and the
        gradient of the own ones.
        """
        sweep = (*self.reference_passes(Pass("kto", sequences=2)), Pass("kto", gradient="none"))
        return Cost((*sweep, Pass("kto")), copies=self.reference_copies())

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> None:
        """One step; logs the loss, z, and how far (times beta) and how often answers are on their
        side of z.
        """
        rows = batch["kto"]
        own = sequence(rows, 0)
        own["reference_sums"], z = self.reference_sweep(rows)
        loss, gradient = self.gradient(own, partial(self.kto_terms, z=z))
        self.apply_gradient(gradient)
        self.log("loss/preference", loss, prog_bar=True)
        self.log("preference/kl", z)

    @torch.no_grad()
    def reference_sweep(self, rows: Batch) -> tuple[Tensor, Tensor]:
        """Reference sums of the rows' own answers, which the gradient needs again; and z."""
        own_sums = []
        total = torch.zeros((), device=self.device)
        n_rows = 0
        for micro_batch in self.sweep(rows):
            reference = self.reference_scores(micro_batch, "kto").sums
            mismatched = sequence(micro_batch, 1)
            self.work.count_forward(mismatched)
            total = total + (self.score(mismatched).sums - reference[:, 1]).sum()
            own_sums.append(reference[:, 0])
            n_rows += len(reference)
        total, count = self.weights.global_sum(torch.stack([total, torch.full_like(total, n_rows)]))
        return torch.cat(own_sums), reference_point(total, count)

    def kto_terms(self, rows: Batch, z: Tensor) -> MeanTerms:
        """Mean over rows of the loss, around a given z."""
        ratios_N = self.score(rows).sums - rows["reference_sums"]
        desirable_N = rows["desirable"]
        rewards_N = self.beta * torch.where(desirable_N, ratios_N - z, z - ratios_N).detach()
        self.log_mean("preference/accuracy", (rewards_N > 0).float())
        self.log_mean("preference/margin", rewards_N)
        return mean_of(
            kto_losses(ratios_N, desirable_N, z, self.beta, self.w_desirable, self.w_undesirable)
        )
