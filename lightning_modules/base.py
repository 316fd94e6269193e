"""What every objective shares: the network, the weight space, the optimizer step, generation."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import lightning.pytorch as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from strategies import Vector, WeightSpace, weight_space
from temper.data import Batch
from temper.errors import TemperError
from temper.losses import MeanTerms, nll, token_logps
from temper.models import NetworkSpec, build_network


@dataclass
class Work:
    """What training has done so far on this rank: cost figures that need no clock.

    Attributes:
        passes: Forward-backward passes over a batch.
        tokens: Tokens in them, padding not counted (int64 scalar on the device: no synchronisation).
    """

    passes: int = 0
    tokens: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.long))


class ObjectiveModule(L.LightningModule):
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
        max_new_tokens: Longest generated answer at validation; None asks the datamodule.
        max_skipped_steps: Stop with an error after this many steps in a row with a non-finite
            gradient. A single one is skipped and counted, and changes no weight.
    """

    #: Names of the datamodule's streams that the training step reads; None: its primary stream.
    streams: ClassVar[tuple[str, ...] | None] = None

    def __init__(
        self,
        network: NetworkSpec,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        micro_batch_size: int | None = None,
        max_new_tokens: int | None = None,
        max_skipped_steps: int = 20,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        for flag, value in (("max_grad_norm", max_grad_norm), ("micro_batch_size", micro_batch_size)):
            if value is not None and value <= 0:
                raise TemperError(f"model.init_args.{flag}={value}: give a positive number, or null for none")
        self.network_spec, self.optimizer_factory, self.scheduler_factory = network, optimizer, lr_scheduler
        self.max_grad_norm, self.micro_batch_size = max_grad_norm, micro_batch_size
        self.max_new_tokens, self.max_skipped_steps = max_new_tokens, max_skipped_steps
        self.network: nn.Module | None = None
        self.skipped_in_a_row = 0
        self.skipped_steps = 0
        self.work = Work()
        self._weights: WeightSpace | None = None

    # -- construction, called by Lightning

    def configure_model(self) -> None:
        """Build or load the network, once the datamodule's tokenizer is known."""
        if self.network is None:
            self.network = build_network(self.network_spec, self.trainer.datamodule.tokenizer).train()

    def configure_optimizers(self) -> Any:
        """Optimizer over the trainable parameters, and its scheduler."""
        optimizer = self.optimizer_factory([p for p in self.parameters() if p.requires_grad])
        return optimizer if self.scheduler_factory is None else ([optimizer], [self.scheduler_factory(optimizer)])

    @property
    def weights(self) -> WeightSpace:
        """The weight space under the Trainer's strategy."""
        if self._weights is None:
            self._weights = weight_space(self.trainer.strategy, self)
        return self._weights

    # -- the pieces of a training step

    def nll_terms(self, rows: Batch) -> MeanTerms:
        """Negative log-likelihood of the labelled tokens (nats), as numerator and denominator."""
        assert self.network is not None
        logits_BTV = self.network(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
        return nll(*token_logps(logits_BTV, rows["labels"]))

    def gradient(self, rows: Batch, reduced: bool = True) -> tuple[Tensor, Vector]:
        """Mean NLL over all ranks and micro-batches, and its gradient at the present weights."""
        self.work.passes += 1
        self.work.tokens = self.work.tokens + rows["attention_mask"].sum()
        return self.weights.gradient(self.nll_terms, rows, self.micro_batch_size, reduced)

    def apply_gradient(self, gradient: Vector, *norms: Tensor) -> bool:
        """Clip, step the optimizer and the scheduler; or skip the step if anything is not finite.

        Args:
            gradient: Reduced gradient of the objective.
            norms: Norms of other vectors that went into it and must be finite too.

        Returns:
            Whether the step was taken.

        Raises:
            RuntimeError: `max_skipped_steps` steps in a row were skipped.
        """
        norm = self.weights.norm(gradient)
        # The one host synchronisation of a step, after all its work has been queued: a step that
        # must change nothing cannot be undone on the device, since optimizers have state.
        if not torch.isfinite(torch.stack([norm, *norms])).all():
            self._skip()
            return False
        self.skipped_in_a_row = 0
        self.weights.assign(self.weights.clip(gradient, norm, self.max_grad_norm))
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        self.log("grad_norm", norm)
        return True

    def _skip(self) -> None:
        self.skipped_in_a_row += 1
        self.skipped_steps += 1
        self.log("skipped_steps", float(self.skipped_steps))
        if self.skipped_in_a_row >= self.max_skipped_steps:
            raise RuntimeError(
                f"{self.skipped_in_a_row} steps in a row had a non-finite gradient (step {self.global_step}): lower the "
                "learning rate (or alpha), or look at the data; model.init_args.max_skipped_steps sets the limit"
            )

    # -- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters; refuse while the weights are displaced."""
        if self._weights is not None and self._weights.is_displaced:
            raise RuntimeError("a checkpoint was asked for while the weights are displaced; ask again after the training step")
        checkpoint["counters"] = {"skipped_steps": self.skipped_steps, "passes": self.work.passes, "tokens": self.work.tokens}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counters up again."""
        counters = checkpoint["counters"]
        self.skipped_steps, self.work = counters["skipped_steps"], Work(counters["passes"], counters["tokens"])

    # -- generation

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Greedy free-running answers to the prompts of a batch: responses_BR, without the prompt."""
        return self.generate(batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """As `validation_step`."""
        return self.generate(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[str]:
        """Greedy answers as text."""
        return self.trainer.datamodule.tokenizer.batch_decode(self.generate(batch), skip_special_tokens=False)

    @torch.no_grad()
    def generate(self, batch: Batch) -> Tensor:
        """Greedy answers to prompts padded on the left: responses_BR (ids, padded on the right)."""
        assert self.network is not None
        answers = self.network.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=self.max_new_tokens or self.trainer.datamodule.max_new_tokens,
            do_sample=False,
        )
        return answers[:, batch["input_ids"].shape[1] :]
