"""Defences of the user's fine-tuning with alignment rows beside the user's: Lisa, SafeInstruct."""

from typing import Any

from lightning_modules.base import ObjectiveModule
from temper.data import Batch
from temper.errors import TemperError
from temper.models import NetworkSpec
from temper.plan.cost import Cost, Pass


class LisaModule(ObjectiveModule):
    """Lisa (Huang et al. 2024, arXiv 2405.18641, algorithm 2), a defence of the fine-tuning stage.

        alignment_steps steps on  f(w) + rho/2 * ||w - w_s||^2,
        then user_steps steps on  u(w) + rho/2 * ||w - w_s||^2,  and so on

    f and u are the NLLs of the streams ``alignment`` and ``user``, ``w_s`` the weights at the last
    switch (first: those that training began with). One pass per step, and one copy of the trainable
    weights. Steps that were skipped do not count. Both streams move on at every step, so that the
    rows of a step depend on its number alone.

    Args:
        network: Where the network comes from.
        rho: Weight of the proximal term, per squared L2 distance over all trainable weights (paper:
            1).
        alignment_steps: Steps on the alignment stream at a time (paper: 100).
        user_steps: Steps on the user's stream at a time (paper: 900).
        kwargs: See `ObjectiveModule`.
    """

    streams = ("user", "alignment")

    def __init__(
        self,
        network: NetworkSpec,
        rho: float = 1.0,
        alignment_steps: int = 100,
        user_steps: int = 900,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, **kwargs)
        if not rho >= 0:
            raise TemperError(
                f"model.init_args.rho={rho}: give a number >= 0 (0 alternates without a proximal"
                " term)"
            )
        for flag, value in (("alignment_steps", alignment_steps), ("user_steps", user_steps)):
            if value < 1:
                raise TemperError(
                    f"model.init_args.{flag}={value}: give a whole number >= 1; SFTModule trains on"
                    " one stream alone"
                )
        self.rho = rho
        self.alignment_steps = alignment_steps
        self.user_steps = user_steps

    def cost(self) -> Cost:
        """One pass over the stream whose turn it is; two copies of the weights are held: those at
        the last switch, and the distance from them.
        """
        turns = self.alignment_steps + self.user_steps
        shares = {"alignment": self.alignment_steps / turns, "user": self.user_steps / turns}
        return Cost(
            tuple(Pass(stream, share, vectors=1) for stream, share in shares.items()), vectors=2
        )

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> None:
        """One step on the stream whose turn it is; logs its loss and how far the weights are from
        the switch.
        """
        turn = self.global_step % (self.alignment_steps + self.user_steps)
        stream = "alignment" if turn < self.alignment_steps else "user"
        if turn in (0, self.alignment_steps) or "at_switch" not in self.kept:
            self.kept["at_switch"] = self.weights.position()
        loss, gradient = self.gradient(batch[stream])
        moved = self.weights.position().sub_(self.kept["at_switch"])
        distance = self.weights.norm(moved)
        self.apply_gradient(gradient.add_(moved.mul_(self.rho)))
        self.log(f"loss/{stream}", loss, prog_bar=True)
        self.log("lisa/distance", distance)


class SafeInstructModule(ObjectiveModule):
    """``u(w) + lam * f(w)``: alignment rows beside the user's in every step.

    Safety rows in the user's fine-tuning are those of Bianchi et al. 2024 (arXiv 2309.07875) and Qi
    et al. 2023 (arXiv 2310.03693).

    u and f are the mean NLLs of the streams ``user`` and ``alignment``, each over its own tokens,
    so ``lam`` does not change with the batch sizes. Two passes per step, one gradient all-reduce.
    The papers mix rows
    instead, as `SFTModule` on `SyntheticAttack` with ``n_safety`` does.

    Args:
        network: Where the network comes from.
        lam: Weight of the alignment loss; 0 is SFT on the user's rows.
        kwargs: See `ObjectiveModule`.
    """

    streams = ("user", "alignment")

    def __init__(self, network: NetworkSpec, lam: float = 1.0, **kwargs: Any) -> None:
        super().__init__(network, **kwargs)
        if not lam >= 0:
            raise TemperError(
                f"model.init_args.lam={lam}: give a number >= 0 (0 is SFT on the user's rows)"
            )
        self.lam = lam

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> None:
        """One step on both streams; logs both losses."""
        (user, alignment), gradient = self.weighted_gradient(
            (1.0, batch["user"], None), (self.lam, batch["alignment"], None)
        )
        self.apply_gradient(gradient)
        self.log("loss/user", user, prog_bar=True)
        self.log("loss/alignment", alignment)
