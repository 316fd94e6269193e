"""The base of unlearning objectives: two streams, two losses, and a guard on the retain loss."""

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_modules.reference import ReferenceModule
from temper.data import Batch, micro_batches, sequence
from temper.errors import TemperError
from temper.losses import MeanTerms, Scores, nll
from temper.losses.unlearning import Sequences
from temper.models import NetworkSpec
from temper.plan.cost import Cost, Pass

#: A start below this counts as this, in nats per token: three times almost nothing is no collapse.
LEAST_START = 0.1


class CollapseGuard:
    """Stops a run that destroys what it should keep: the retain NLL, as a running mean over about
    ten steps, may not exceed ``factor`` times its start.

    The comparison is made on the device. Its outcome is copied, without waiting, to host memory
    that is read after the step's own synchronisation, so the guard adds none.

    Args:
        factor: How many times its start the retain NLL may reach. The start is that of the first
            step, before any weight has moved, and at least `LEAST_START`.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.start: Tensor | None = None
        self.running: Tensor | None = None
        self._collapsed: Tensor | None = None

    def update(self, retain_nll: Tensor) -> Tensor:
        """Add a step's retain NLL (scalar, the same on every rank); returns the running mean."""
        value = retain_nll.detach().clone()
        if self.start is None or self.running is None:
            self.start = value
            self.running = value
        # From a checkpoint they come on the CPU: a module is moved after that was read.
        self.start = self.start.to(value.device)
        self.running = self.running.to(value.device)
        # A value that is not finite says nothing here: such a step is skipped, and counted, by the
        # objective.
        self.start = torch.where(self.start.isfinite(), self.start, value)
        self.running = torch.where(self.running.isfinite(), self.running, value)
        self.running = torch.where(value.isfinite(), self.running.lerp(value, 0.1), self.running)
        collapsed = self.running > self.factor * self.start.clamp(min=LEAST_START)
        if self._collapsed is None:
            # Copies to memory that is not pinned wait for the device.
            self._collapsed = torch.zeros((), dtype=torch.bool, pin_memory=collapsed.is_cuda)
        self._collapsed.copy_(collapsed, non_blocking=True)
        return self.running

    def check(self, step: int) -> None:
        """Raise if the last `update` found a collapse; to be called once the device has been waited
        for.

        Raises:
            RuntimeError: it did; with the values, the flag and the settings to change.
        """
        if self._collapsed is None or not bool(self._collapsed):
            return
        assert self.start is not None and self.running is not None
        raise RuntimeError(
            f"collapse: the retain NLL went from {float(self.start):.3g} to"
            f" {float(self.running):.3g} nats per token (step {step}), over"
            f" model.init_args.collapse_factor={self.factor:g} times its start (at least"
            f" {LEAST_START:g}): what should be kept is being unlearned too. Lower the learning"
            " rate or gamma, raise alpha, or choose another forget or retain loss; go on from an"
            " earlier checkpoint. A larger collapse_factor allows more, null switches this off"
        )

    def state_dict(self) -> dict[str, Tensor | None]:
        """Start and running mean, for a checkpoint."""
        return {"start": self.start, "running": self.running}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Restore start and running mean."""
        self.start = state["start"]
        self.running = state["running"]


class ForgetRetainModule(ReferenceModule):
    """Base of ``L = gamma * L_forget + alpha * L_retain``, with a collapse guard. Subclasses write
    the two losses.

    Args:
        network: Where the network comes from.
        gamma: Weight of the forget loss.
        alpha: Weight of the retain loss.
        collapse_factor: Stop with an error once the retain NLL, a running mean over about ten
            steps, exceeds this many times its start (that counts as at least 0.1 nats per token);
            None switches it off. Where the objective does not score the retain rows it costs a
            forward pass.
        kwargs: See `ReferenceModule`.
    """

    streams: tuple[str, ...] | None = ("forget", "retain")

    def __init__(
        self,
        network: NetworkSpec,
        gamma: float = 1.0,
        alpha: float = 1.0,
        collapse_factor: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, **kwargs)
        for flag, value in (("gamma", gamma), ("alpha", alpha)):
            if not value >= 0:
                raise TemperError(f"model.init_args.{flag}={value}: give a number >= 0")
        if gamma == 0:
            raise TemperError(
                "model.init_args.gamma=0: nothing is forgotten; give a number > 0, or use SFTModule"
                " on the retain rows"
            )
        if collapse_factor is not None and collapse_factor <= 1:
            raise TemperError(
                f"model.init_args.collapse_factor={collapse_factor}: give a number > 1, such as 3,"
                " or null for no guard"
            )
        self.gamma = gamma
        self.alpha = alpha
        self.guard = None if collapse_factor is None else CollapseGuard(collapse_factor)
        self._retain_nll: list[Tensor] = []
        if alpha == 0 and self.guard is None:  # then data without retain rows suffice
            self.streams = ("forget",)

    @abstractmethod
    def forget_rows(self, rows: Batch) -> Batch:
        """The sequences of forget rows that the forget loss reads."""

    #: The sequences of retain rows that the retain loss reads.
    retain_sequences: Sequences = "answer"

    @abstractmethod
    def forget_terms(self, rows: Batch) -> MeanTerms:
        """The forget loss."""

    @abstractmethod
    def retain_terms(self, rows: Batch) -> MeanTerms:
        """The retain loss; calls `watch` with its scores."""

    def forget_sequences(self) -> int:
        """Sequences of a forget row that the forget loss reads, for `cost`."""
        return 1

    def cost(self) -> Cost:
        """A gradient of each loss; the reference first, on the streams that it scores."""
        passes = [Pass("forget", sequences=self.forget_sequences())]
        if self.alpha:
            n = 2 if self.retain_sequences == "both" else 1
            passes.append(Pass("retain", sequences=n, vectors=1))
        scored = [each for each in passes if each.stream in self.reference_streams]
        if self.guard is not None and not self.alpha:
            passes.append(Pass("retain", vectors=1, gradient="none"))
        return Cost((*self.reference_passes(*scored), *passes), copies=self.reference_copies())

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> None:
        """One step; logs both losses, and the running retain NLL if it is guarded."""
        kept = self.retain_rows(batch["retain"]) if "retain" in batch else {}
        (forget, retain), gradient = self.weighted_gradient(
            (self.gamma, self.forget_rows(batch["forget"]), self.forget_terms),
            (self.alpha, kept, self.retain_terms),
        )
        if self.guard is not None:
            self.log("collapse/retain_nll", self.guard.update(self._mean_nll(kept)))
        self.apply_gradient(gradient)
        self.log("loss/forget", forget, prog_bar=True)
        if self.alpha:
            self.log("loss/retain", retain, prog_bar=True)
        # After the step's synchronisation: reading the guard's outcome waits for nothing.
        if self.guard is not None:
            self.guard.check(self.global_step)

    def retain_rows(self, rows: Batch) -> Batch:
        """The sequences of retain rows that the retain loss reads."""
        return pick(rows, self.retain_sequences, "retain")

    def watch(self, retain: Scores) -> None:
        """Give the guard the scores of a micro-batch of retain rows; of two sequences the answer
        counts.
        """
        if self.guard is not None:
            retain = retain[:, 0] if retain.mask.dim() == 3 else retain
            self._retain_nll.append(torch.stack([terms.detach().float() for terms in nll(retain)]))

    def _mean_nll(self, rows: Batch) -> Tensor:
        """Retain NLL of this step over all micro-batches and ranks; scored here if no loss was."""
        if not self._retain_nll:
            self.work.count_forward(rows)
            with torch.no_grad():
                for micro_batch in micro_batches(rows, self.micro_batch_size):
                    self.watch(self.score(micro_batch))
        total, count = self.weights.global_sum(torch.stack(self._retain_nll).sum(0))
        self._retain_nll = []
        mean: Tensor = total / count
        return mean

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the guard's state."""
        super().on_save_checkpoint(checkpoint)
        if self.guard is not None:
            checkpoint["collapse"] = self.guard.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the guard: a resumed run is measured against its first start."""
        super().on_load_checkpoint(checkpoint)
        if self.guard is not None and "collapse" in checkpoint:
            self.guard.load_state_dict(checkpoint["collapse"])


WITHOUT_PAIRS = {
    "forget": "choose data with pairs, or a loss without substitutes (ga, npo, simnpo, wga, satimp,"
    " undial)",
    "retain": "set data.init_args.retain_substitutes=true (files need a column 'substitute' then),"
    " or choose a loss without substitutes (nll, kl, kl_all, embedding)",
}


def pick(rows: Batch, sequences: Sequences, stream: Literal["forget", "retain"]) -> Batch:
    """The sequences of a stream's rows that a loss reads; the others cost no pass.

    Raises:
        TemperError: it reads a substitute answer, and the rows have none.
    """
    paired = rows["input_ids"].dim() == 3
    if sequences != "answer" and not paired:
        raise TemperError(
            f"model.init_args.{stream}: this loss reads a substitute answer, and the stream"
            f" {stream!r} holds one sequence per row; {WITHOUT_PAIRS[stream]}"
        )
    if sequences == "both" or not paired:
        return rows
    return sequence(rows, {"answer": 0, "substitute": 1}[sequences])
