"""What every objective shares: the network, the weight space, the optimizer step."""

from collections.abc import Callable, Collection, Iterator
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_modules.answers import AnswersMixin
from lightning_modules.packing import PackingMixin
from lightning_modules.resume import ResumeMixin
from strategies import Vector, WeightSpace, weight_space
from temper.data import Batch, micro_batches
from temper.errors import TemperError
from temper.losses import MeanTerms, Scores, nll
from temper.models import NetworkSpec, build_network, score
from temper.plan.cost import Cost, Pass

Loss = Callable[[Batch], MeanTerms]


class ObjectiveModule(PackingMixin, AnswersMixin, ResumeMixin):
    """Base of all objectives. Subclasses write `training_step` and end it with `apply_gradient`.

    Optimisation is manual for every objective, single-pass ones included: the weight space owns
    gradients, micro-batches and clipping, so all objectives share one definition of the mean loss
    and one optimizer step.

    Args:
        network: Where the network comes from.
        optimizer: Optimizer over the trainable parameters.
        lr_scheduler: Stepped once per optimizer step; None keeps the rate constant.
        max_grad_norm: Clip the global gradient norm to this; None switches clipping off.
        micro_batch_size: Rows per forward pass and device; None takes the whole share of a
            batch at once. Changes memory and speed, not the result.
        packing: Put several sequences into one row of the forward pass, so that less is computed
            for padding; rows, losses and results stay what they are. None: where it helps (from a
            million parameters on; smaller networks gain a tenth at most), if the network keeps
            packed sequences apart.
        fused_loss: Compute log-probabilities chunk by chunk, without ever holding the logits of
            a batch: less memory with a large vocabulary, more time (benchmarks/fused_loss.md has
            figures).
        max_new_tokens: Longest generated answer at validation; None asks the datamodule.
        max_skipped_steps: Stop with an error after this many steps in a row with a non-finite
            gradient. A single one is skipped and counted, and changes no weight.
    """

    #: Names of the datamodule's streams that the training step reads; None: its primary stream.
    streams: ClassVar[tuple[str, ...] | None] = None
    #: Why the objective cannot have weights or optimizer state in parts (FSDP2, ZeRO), if it
    #: cannot.
    unshardable: ClassVar[str | None] = None

    def __init__(
        self,
        network: NetworkSpec,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        micro_batch_size: int | None = None,
        packing: bool | None = None,
        fused_loss: bool = False,
        max_new_tokens: int | None = None,
        max_skipped_steps: int = 20,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        for flag, value in (
            ("max_grad_norm", max_grad_norm),
            ("micro_batch_size", micro_batch_size),
        ):
            if value is not None and not value > 0:
                raise TemperError(
                    f"model.init_args.{flag}={value}: give a positive number, or null for none"
                )
        self.network_spec, self.optimizer_factory, self.scheduler_factory = (
            network,
            optimizer,
            lr_scheduler,
        )
        self.max_grad_norm, self.micro_batch_size, self.fused_loss = (
            max_grad_norm,
            micro_batch_size,
            fused_loss,
        )
        self.choose_packing(packing)
        self.max_new_tokens, self.max_skipped_steps = max_new_tokens, max_skipped_steps
        self.network: nn.Module | None = None
        self._weights: WeightSpace | None = None
        self._noted: dict[str, tuple[Tensor, int]] = {}
        self._later_part = False  # of a step's rows: forward passes over it are not counted again

    # -- construction, called by Lightning

    def setup(self, stage: str) -> None:
        """Forget the weight space of an earlier loop.

        Raises:
            TemperError: the objective needs whole weights, and the strategy cuts them.
        """
        self._weights = None
        if (
            stage == "fit"
            and self.unshardable
            and getattr(self.trainer.strategy, "is_sharded", False)
        ):
            raise TemperError(
                f"trainer.strategy: {type(self).__name__} {self.unshardable}; use one device,"
                " or ddp"
            )

    def configure_model(self) -> None:
        """Build or load the network, once the datamodule's tokenizer is known."""
        if self.network is None:
            self.network = build_network(
                self.network_spec, self.trainer.datamodule.tokenizer
            ).train()

    def configure_optimizers(self) -> Any:
        """Optimizer over the trainable parameters, and its scheduler."""
        optimizer = self.optimizer_factory([p for p in self.parameters() if p.requires_grad])
        return (
            optimizer
            if self.scheduler_factory is None
            else ([optimizer], [self.scheduler_factory(optimizer)])
        )

    def networks(self) -> list[nn.Module]:
        """Every network that takes part, for strategies that cut weights into parts."""
        assert self.network is not None
        return [self.network]

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)``: strategies whose wrapper must see every pass send it through
        here.
        """
        return function(*args)

    @property
    def weights(self) -> WeightSpace:
        """The weight space under the Trainer's strategy."""
        if self._weights is None:
            self._weights = weight_space(self.trainer.strategy, self)
        return self._weights

    def cost(self) -> Cost:
        """What a step computes and holds, for the verb `plan`. Here: one gradient of every stream,
        added up.
        """
        return Cost(
            tuple(
                Pass(stream, vectors=min(n, 1)) for n, stream in enumerate(self.streams or (None,))
            )
        )

    # -- the pieces of a training step

    def score(self, rows: Batch, logits: bool = False, hidden: bool = False) -> Scores:
        """What the policy says about the labels of rows: the forward pass of every objective."""
        assert self.network is not None
        return score(self.network, rows, logits, hidden, self.fused_loss)

    def nll_terms(self, rows: Batch) -> MeanTerms:
        """Negative log-likelihood of the labelled tokens (nats), as numerator and denominator."""
        return nll(self.score(rows))

    def gradient(
        self, rows: Batch, loss: Loss | None = None, reduced: bool = True
    ) -> tuple[Tensor, Vector]:
        """A mean loss over all ranks and micro-batches (NLL if none is given), and its gradient at
        the present weights.
        """
        self.count(rows)
        chosen = loss or self.nll_terms

        def terms(part: Batch) -> MeanTerms:
            result = chosen(part)
            self._later_part = True
            return result

        try:
            return self.weights.gradient(terms, rows, self.micro_batch_size, reduced)
        finally:
            self._later_part = False

    def parts(self, rows: Batch) -> Iterator[Batch]:
        """Micro-batches of rows, for sweeps without gradient: forward passes over all of them count
        as one.
        """
        try:
            for part in micro_batches(rows, self.micro_batch_size):
                yield part
                self._later_part = True
        finally:
            self._later_part = False

    def weighted_gradient(
        self, *parts: tuple[float, Batch, Loss | None]
    ) -> tuple[list[Tensor], Vector]:
        """``sum of weight * loss`` over parts that are means of their own: the losses, and the
        reduced gradient.

        One backward pass per part and one all-reduce in all; a part of weight 0 is not computed and
        its loss is 0.
        """
        losses, vector = [], None
        for weight, rows, loss in parts:
            if weight == 0:
                losses.append(torch.zeros((), device=self.device))
                continue
            value, part = self.gradient(rows, loss, reduced=False)
            losses.append(value)
            vector = part.mul_(weight) if vector is None else vector.add_(part.mul_(weight))
        if vector is None:
            raise ValueError("every part of the objective has weight 0")
        return losses, self.weights.reduce(vector)

    def count(self, rows: Batch, backward: bool = True) -> None:
        """Count a pass over rows: forward and backward, or forward only."""
        tokens = rows["attention_mask"].sum()
        if backward:
            self.work.passes, self.work.tokens = self.work.passes + 1, self.work.tokens + tokens
        else:
            self.work.forwards, self.work.forward_tokens = (
                self.work.forwards + (not self._later_part),
                self.work.forward_tokens + tokens,
            )

    def note(self, name: str, values: Tensor) -> None:
        """Log the mean of values over the micro-batches of this step, on this rank, once the step
        is taken.
        """
        total, n = self._noted.get(name, (torch.zeros((), device=values.device), 0))
        self._noted[name] = total + values.detach().float().sum(), n + values.numel()

    def apply_gradient(self, gradient: Vector, *norms: Tensor, skip: Collection[str] = ()) -> bool:
        """Clip, step the optimizer and the scheduler; or skip the step if anything is not finite.

        Args:
            gradient: Reduced gradient of the objective.
            norms: Norms of other vectors that went into it and must be finite too.
            skip: Names of parameters that this step does not train: no gradient, decay or momentum.

        Returns:
            Whether the step was taken.

        Raises:
            RuntimeError: `max_skipped_steps` steps in a row were skipped.
        """
        for name, tensor in zip(self.weights.names, gradient, strict=True):
            if name in skip:
                tensor.zero_()
        norm = self.weights.norm(gradient)
        noted, self._noted = self._noted, {}
        # The one host synchronisation that Temper adds to a step, after all its work has been
        # queued: a step that must change nothing cannot be undone on the device, since optimizers
        # have state.
        if not torch.isfinite(torch.stack([norm, *norms])).all():
            self._skip()
            return False
        self.skipped_in_a_row = 0
        self.weights.assign(self.weights.clip(gradient, norm, self.max_grad_norm), skip)
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        self.log_dict({"grad_norm": norm} | {name: total / n for name, (total, n) in noted.items()})
        return True

    def _skip(self) -> None:
        self.skipped_in_a_row += 1
        self.skipped_steps += 1
        self.log("skipped_steps", float(self.skipped_steps))
        if self.skipped_in_a_row >= self.max_skipped_steps:
            raise RuntimeError(
                f"{self.skipped_in_a_row} steps in a row had a non-finite gradient (step"
                f" {self.global_step}): lower the learning rate (or alpha), or look at the data;"
                " model.init_args.max_skipped_steps sets the limit"
            )
