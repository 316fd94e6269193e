"""TAR: resist tampering, by gradients along the path of a simulated fine-tuning attack."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_modules.reference import ReferenceModule
from strategies import Vector
from temper.data import Batch, select
from temper.errors import TemperError
from temper.losses import IGNORE_INDEX, MeanTerms, Scores, nll
from temper.losses.tamper import dpo_loss, hidden_shift, negative_entropy
from temper.models import NetworkSpec
from temper.plan.cost import Cost, Pass


def _entropy(module: "TARModule", rows: Batch) -> MeanTerms:
    return negative_entropy(module.score(rows, logits=True))


def _preference(module: "TARModule", rows: Batch) -> MeanTerms:
    reference = module.reference_scores(rows, HELD_OUT["preference"])
    return dpo_loss(module.score(rows), reference, module.preference_beta)


TAMPER_LOSSES: dict[str, Callable[["TARModule", Batch], MeanTerms]] = {
    "entropy": _entropy,
    "preference": _preference,
}
# The held-out stream that each loss reads.
HELD_OUT = {"entropy": "harmful_heldout", "preference": "heldout_pairs"}


class TARModule(ReferenceModule):
    """TAR (Tamirisa et al. 2024, arXiv 2408.00761, algorithm 1), first order.

        w_0 = w,  w_(i+1) = AdamW(w_i, grad NLL_harmful(w_i)),  i = 0 .. K - 1
        g   = sum over every 4th i of c_i grad T(w_(i+1))
              + grad [NLL(w) + a * mean_(l, t) ||h_l,t - ref h_l,t||_2]
        c_i = tamper_weight * exp(tamper_growth * (i - (K - 1)))

    T is the tamper-resistance loss on harmful rows that the adversary does not see: the negative
    entropy of the answer's token distributions, or DPO towards refusals. Inner steps are constants:
    no second derivatives. The adversary's batch i is every K-th row of the harmful batch, from row
    i on, so that it is the same however many ranks share the batch. The second bracket, on the
    alignment stream, retains what the model can do; h are hidden states, embeddings included.

    Costs ``K + K / tamper_every + 1`` forward-backward passes a step, and at its peak seven copies
    of the trainable weights in float32 (start, offset, two moments, saved weights, a gradient,
    their sum). ``inner_steps`` or ``tamper_weight`` 0 leaves the bracket alone.

    Simplified against the released code: one adversary a step instead of one sampled from several
    data sets (some switching from benign to harmful rows), with a fixed learning rate instead of
    one of three. The authors begin from weights with random-mapped representations; here training
    begins from what it is given.

    Args:
        network: Where the network comes from.
        inner_steps: K, steps of the adversary (paper: 64).
        inner_lr: Learning rate of its AdamW (paper: one of 2e-6, 2e-5, 4e-5).
        inner_weight_decay: Weight decay of its AdamW (released code: torch's default).
        tamper_every: Take the tamper-resistance gradient after every so many inner steps (paper:
            4).
        tamper_weight: Its weight after the last inner step (paper: 4).
        tamper_growth: How fast weights grow along the inner steps (paper: 0.0625).
        tamper_loss: ``entropy`` (reads the stream ``harmful_heldout``) or ``preference``
            (``heldout_pairs``: refusal first, harmful answer second).
        preference_beta: Beta of the preference loss.
        representation_weight: a, weight of the distance to the reference's hidden states (paper:
            1).
        kwargs: See `ReferenceModule`.

    Raises:
        TemperError: the harmful batch is not divisible by ``inner_steps`` times the number of
            ranks.
    """

    streams = ("alignment", "harmful", "harmful_heldout")

    def __init__(
        self,
        network: NetworkSpec,
        inner_steps: int = 64,
        inner_lr: float = 2e-5,
        inner_weight_decay: float = 0.01,
        tamper_every: int = 4,
        tamper_weight: float = 4.0,
        tamper_growth: float = 0.0625,
        tamper_loss: Literal["entropy", "preference"] = "entropy",
        preference_beta: float = 0.1,
        representation_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        weights = {
            "inner_lr": inner_lr,
            "inner_weight_decay": inner_weight_decay,
            "tamper_weight": tamper_weight,
        }
        for flag, value in (
            weights | {"representation_weight": representation_weight, "inner_steps": inner_steps}
        ).items():
            if not value >= 0:
                raise TemperError(f"model.init_args.{flag}={value}: give a number >= 0")
        if not preference_beta > 0:
            raise TemperError(
                f"model.init_args.preference_beta={preference_beta}: give a number > 0"
            )
        if tamper_loss not in TAMPER_LOSSES:
            raise TemperError(
                f"model.init_args.tamper_loss={tamper_loss}: give one of {', '.join(TAMPER_LOSSES)}"
            )
        if tamper_every < 1 or inner_steps % tamper_every:
            raise TemperError(
                f"model.init_args.tamper_every={tamper_every}: inner_steps={inner_steps} is no"
                " multiple of it, and inner steps after the last tamper-resistance gradient would"
                " count for nothing; give a divisor of inner_steps"
            )
        super().__init__(network, **kwargs)
        self.tampers = inner_steps > 0 and tamper_weight > 0
        self.tamper_loss = tamper_loss
        self.preference_beta = preference_beta
        self.representation_weight = representation_weight
        if self.fused_loss and self.tampers and tamper_loss == "entropy":
            raise TemperError(
                "model.init_args.fused_loss=true: the entropy needs the logits themselves; set it"
                " to false"
            )
        self.inner_steps = inner_steps
        self.inner_lr = inner_lr
        self.inner_weight_decay = inner_weight_decay
        self.tamper_every = tamper_every
        self.tamper_weight = tamper_weight
        self.tamper_growth = tamper_growth
        held_out = (HELD_OUT[tamper_loss],) if self.tampers else ()
        harmful = ("harmful", *held_out) if self.tampers else ()
        self.streams = ("alignment", *harmful)
        paired = held_out if tamper_loss == "preference" else ()
        if representation_weight:  # hidden states, for the retain loss
            self.read_reference("everything", ("alignment", *paired))
        else:
            self.read_reference("sums" if paired else "nothing", paired)

    def on_fit_start(self) -> None:
        """Refuse a harmful batch that the inner steps cannot share."""
        super().on_fit_start()
        source = self.datamodule.sources.get("harmful")
        shares = self.inner_steps * self.weights.world_size
        if self.tampers and source is not None and source.batch_size % shares:
            raise TemperError(
                f"stream 'harmful': batch size {source.batch_size} cannot be shared by"
                f" {self.inner_steps} inner steps on {self.weights.world_size} ranks; set"
                f" data.init_args.harmful_batch_size to a multiple of {shares}, or change"
                " model.init_args.inner_steps"
            )

    def cost(self) -> Cost:
        """Inner steps and tamper-resistance passes at displaced weights, then the retain pass."""
        retain = Pass("alignment", vectors=int(self.tampers))
        copies = self.reference_copies()
        retained = (*(self.reference_passes(retain) if self.representation_weight else ()), retain)
        if not self.tampers:
            return Cost(retained, copies=copies)
        held = 5  # start, offset, the adversary's two moments, the sum of gradients
        paired = self.tamper_loss == "preference"
        times = self.inner_steps / self.tamper_every
        inner = Pass(
            "harmful", self.inner_steps, 1 / self.inner_steps, vectors=held, displaced=True
        )
        heldout = Pass(
            HELD_OUT[self.tamper_loss],
            times,
            sequences=2 if paired else 1,
            vectors=held,
            displaced=True,
        )
        passes = (inner, *(self.reference_passes(heldout) if paired else ()), heldout, *retained)
        return Cost(passes, vectors=1, unreduced=1, copies=copies, reductions=self.inner_steps + 1)

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> None:
        """One step; logs the retain losses, the adversary's loss at both ends and the last
        tamper-resistance loss.
        """
        tamper: Vector | None = None
        norms: list[Tensor] = []
        if self.tampers:
            heldout = batch[HELD_OUT[self.tamper_loss]]
            tamper, norms = self._tamper_gradient(batch["harmful"], heldout)
        loss, gradient = self._retain_gradient(batch["alignment"])
        if tamper is not None:
            gradient.add_(tamper)
        self.apply_gradient(self.weights.reduce(gradient), *norms)
        self.log("loss/retain", loss, prog_bar=True)

    def _tamper_gradient(self, harmful: Batch, heldout: Batch) -> tuple[Vector, list[Tensor]]:
        """``sum_i c_i grad T(w_(i+1))``, not reduced yet, and the adversary's gradient norms."""
        start = self.weights.position()
        offset = Vector([torch.zeros_like(tensor) for tensor in start])
        # AdamW on the offset: its step reads gradients alone, save for the decay, which is of
        # w + offset.
        adversary = torch.optim.AdamW(offset.tensors, lr=self.inner_lr, weight_decay=0.0)
        total: Vector | None = None
        norms = []
        losses = []
        for step in range(self.inner_steps):
            with self.weights.displaced(offset, 1.0):
                loss, gradient = self.gradient(select(harmful, slice(step, None, self.inner_steps)))
            losses.append(loss)
            norms.append(self.weights.norm(gradient))
            self._attack(adversary, start, offset, gradient)
            if (step + 1) % self.tamper_every == 0:
                with self.weights.displaced(offset, 1.0):
                    tamper_loss, gradient = self.gradient(
                        heldout, self._tamper_terms, reduced=False
                    )
                growth = math.exp(self.tamper_growth * (step - (self.inner_steps - 1)))
                gradient.mul_(self.tamper_weight * growth)
                total = gradient if total is None else total.add_(gradient)
        assert total is not None
        self.log("tar/inner_first", losses[0])
        self.log("tar/inner_last", losses[-1])
        self.log(f"tar/{self.tamper_loss}", tamper_loss)
        return total, norms

    def _attack(
        self, adversary: torch.optim.AdamW, start: Vector, offset: Vector, gradient: Vector
    ) -> None:
        """One AdamW step of the adversary."""
        decay = self.inner_lr * self.inner_weight_decay
        if decay:
            for moved, origin in zip(offset, start, strict=True):
                moved.sub_((moved + origin).mul_(decay))
        for moved, slope in zip(offset, gradient, strict=True):
            moved.grad = slope
        adversary.step()
        adversary.zero_grad()

    def _tamper_terms(self, rows: Batch) -> MeanTerms:
        return TAMPER_LOSSES[self.tamper_loss](self, rows)

    def _retain_gradient(self, rows: Batch) -> tuple[Tensor, Vector]:
        """Retain loss and its gradient, not reduced yet."""
        if not self.representation_weight:
            return self.gradient(rows, reduced=False)
        # Two means over different counts in one pass: the second is brought to the first one's
        # count, both global.
        counts = torch.stack(
            [(rows["labels"][..., 1:] != IGNORE_INDEX).sum(), rows["attention_mask"].sum()]
        ).double()
        tokens, positions = self.weights.global_sum(counts)
        loss = partial(self._retain_terms, ratio=tokens / positions)
        return self.gradient(rows, loss, reduced=False)

    def _retain_terms(self, rows: Batch, ratio: Tensor) -> MeanTerms:
        reference = self.reference_scores(rows, "alignment", hidden=True)
        scores = self.score(rows, hidden=True)
        assert isinstance(reference, Scores)
        shift = hidden_shift(scores, reference)
        self.log_mean("tar/representation_shift", shift.total / shift.count)
        total, count = nll(scores)
        shifted = self.representation_weight * (ratio * shift.total).to(total.dtype)
        return MeanTerms(total + shifted, count)
