"""The base of all objectives: the network, the weight space, the optimizer step, greedy answers."""

from collections.abc import Callable, Collection, Iterator
from typing import Any, ClassVar

import lightning.pytorch as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_modules.lost_updates import LostUpdates
from lightning_modules.packing import RowPacking
from lightning_modules.positions import check_positions
from lightning_modules.resume import ResumeState
from lightning_modules.work import Work
from strategies import Loss, Vector, WeightSpace, weight_space
from temper.checkpoint_file import OURS, check_weights
from temper.data import Batch, micro_batches
from temper.errors import TemperError
from temper.losses import MeanTerms, Scores, nll
from temper.models import NetworkSpec, build_network, score
from temper.models.blocks import undecayed_weights
from temper.models.end_tokens import end_tokens
from temper.models.generate import generate_greedy
from temper.models.score import output_layer
from temper.plan.cost import Cost, Pass


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
        packing: Put several sequences into one row of the forward pass, so that less is computed
            for padding; does not change losses or results. None packs where it helps (from a
            million parameters on; smaller networks gain a tenth at most) and the network keeps
            packed sequences apart.
        fused_loss: Compute log-probabilities chunk by chunk, without ever holding the logits of
            a batch: less memory with a large vocabulary, more time (benchmarks/fused_loss.md).
        max_new_tokens: Longest generated answer at validation; None asks the datamodule.
        decay_norm_and_bias: Apply the optimizer's weight decay to weights of norms and to biases
            too. False exempts them, as Hugging Face's trainers do, and so the code of most papers
            (`temper.models.blocks.undecayed_weights`); adapters have neither.
        max_skipped_steps: Stop with an error after this many steps in a row with a non-finite
            gradient. A single one is skipped and counted, and changes no weight.
    """

    #: Names of the datamodule's streams that the training step reads; None: its primary stream.
    streams: tuple[str, ...] | None = None
    #: Why the objective cannot have sharded weights or optimizer state (FSDP2, ZeRO), if it cannot.
    unshardable: ClassVar[str | None] = None
    #: Why the objective cannot have its rows packed, if it cannot.
    unpackable: ClassVar[str | None] = None

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
        decay_norm_and_bias: bool = True,
        max_skipped_steps: int = 20,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        limits = {"max_grad_norm": max_grad_norm, "micro_batch_size": micro_batch_size}
        for flag, value in limits.items():
            if value is not None and not value > 0:
                raise TemperError(
                    f"model.init_args.{flag}={value}: give a positive number, or null for none"
                )
        self.network_spec = network
        self.optimizer_factory = optimizer
        self.scheduler_factory = lr_scheduler
        self.max_grad_norm = max_grad_norm
        self.micro_batch_size = micro_batch_size
        self.packing = RowPacking(packing, type(self).__name__, self.unpackable)
        self.fused_loss = fused_loss
        self.max_new_tokens = max_new_tokens
        self.decay_norm_and_bias = decay_norm_and_bias
        self.max_skipped_steps = max_skipped_steps
        self.network: nn.Module | None = None
        self.work = Work()
        self.lost_updates = LostUpdates()
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        #: Vectors that outlive a step, by name: saved in checkpoints, sharded as the weights are.
        self.kept: dict[str, Vector] = {}
        self._weights: WeightSpace | None = None
        self._means: dict[str, tuple[Tensor, int]] = {}

    # -- construction, called by Lightning

    def setup(self, stage: str) -> None:
        """Forget the weight space of an earlier loop.

        Raises:
            TemperError: the objective needs whole weights, and the strategy shards them.
        """
        self._weights = None
        if stage != "fit" or self.unshardable is None:
            return
        if getattr(self.trainer.strategy, "is_sharded", False):
            raise TemperError(
                f"trainer.strategy: {type(self).__name__} {self.unshardable}; use one device,"
                " or ddp"
            )

    def configure_callbacks(self) -> list[L.Callback]:
        """The callback that saves and restores counters and random generators."""
        return [ResumeState()]

    def configure_model(self) -> None:
        """Build or load the network, once the datamodule's tokenizer is known."""
        if self.network is None:
            self.network = build_network(self.network_spec, self.datamodule.tokenizer).train()

    def configure_optimizers(self) -> Any:
        """Optimizer over the trainable parameters, and its scheduler.

        Raises:
            TemperError: weights are to be exempt from a decay that the optimizer has not.
        """
        optimizer = self.optimizer_factory(self.parameter_groups())
        if not self.decay_norm_and_bias and "weight_decay" not in optimizer.defaults:
            raise TemperError(
                f"model.init_args.decay_norm_and_bias=false: {type(optimizer).__name__} has no"
                " weight decay; leave it out, or use torch.optim.AdamW"
            )
        if self.scheduler_factory is None:
            return optimizer
        return [optimizer], [self.scheduler_factory(optimizer)]

    def parameter_groups(self) -> list[Any]:
        """The trainable parameters, as one group or as one with and one without weight decay."""
        learned = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if self.decay_norm_and_bias:
            return list(learned.values())
        exempt = undecayed_weights(self)
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in learned.items() if name not in exempt]},
            {"params": [p for name, p in learned.items() if name in exempt], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    @property
    def datamodule(self) -> Any:
        """The Trainer's datamodule."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def policy(self) -> Any:
        """The network that is trained, once it is built."""
        assert self.network is not None, "the network is built by configure_model"
        return self.network

    @property
    def weights(self) -> WeightSpace:
        """The weight space under the Trainer's strategy."""
        if self._weights is None:
            self._weights = weight_space(self.trainer.strategy, self)
        return self._weights

    def networks(self) -> list[nn.Module]:
        """Every network that takes part, for strategies that shard weights."""
        return [self.policy]

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call ``function(*args)``, for strategies whose wrapper must see every pass."""
        return function(*args)

    def cost(self) -> Cost:
        """Passes and memory of a step, for the verb `plan`. Here: the sum of one gradient of every
        stream.
        """
        streams = self.streams or (None,)
        return Cost(tuple(Pass(stream, vectors=min(n, 1)) for n, stream in enumerate(streams)))

    # -- elements of a training step

    def score(self, rows: Batch, logits: bool = False, hidden: bool = False) -> Scores:
        """The policy's scores of the labels of rows: the forward pass of every objective."""
        return score(self.policy, rows, logits, hidden, self.fused_loss)

    def nll_terms(self, rows: Batch) -> MeanTerms:
        """Negative log-likelihood of the labelled tokens (nats), as numerator and denominator."""
        return nll(self.score(rows))

    def gradient(
        self, rows: Batch, loss: Loss | None = None, reduced: bool = True
    ) -> tuple[Tensor, Vector]:
        """A mean loss and its gradient at the present weights, over all ranks and micro-batches.

        Args:
            rows: This rank's rows.
            loss: Maps a micro-batch to the terms of its mean; None is the NLL.
            reduced: As in `WeightSpace.gradient`: False leaves the mean over ranks to a later
                `WeightSpace.reduce`.
        """
        self.work.count_pass(rows)
        chosen = loss or self.nll_terms

        def terms(micro_batch: Batch) -> MeanTerms:
            result = chosen(micro_batch)
            self.work.end_micro_batch()
            return result

        # A loss may run forward passes too (of a reference): all micro-batches count as one pass.
        with self.work.one_batch():
            return self.weights.gradient(terms, rows, self.micro_batch_size, reduced)

    def weighted_gradient(
        self, *losses: tuple[float, Batch, Loss | None]
    ) -> tuple[list[Tensor], Vector]:
        """Values of several mean losses, and the reduced gradient of their weighted sum.

        One backward pass per loss and one all-reduce in all. A loss of weight 0 is not computed,
        and its value is 0.

        Args:
            losses: Weight, rows and loss (None: the NLL).
        """
        values = []
        vector: Vector | None = None
        for weight, rows, loss in losses:
            if weight == 0:
                values.append(torch.zeros((), device=self.device))
                continue
            value, gradient = self.gradient(rows, loss, reduced=False)
            values.append(value)
            gradient.mul_(weight)
            vector = gradient if vector is None else vector.add_(gradient)
        if vector is None:
            raise ValueError("every loss of the objective has weight 0")
        return values, self.weights.reduce(vector)

    def sweep(self, rows: Batch) -> Iterator[Batch]:
        """Micro-batches of rows, for forward passes without gradient; they count as one pass."""
        with self.work.one_batch():
            for micro_batch in micro_batches(rows, self.micro_batch_size):
                yield micro_batch
                self.work.end_micro_batch()

    def log_mean(self, name: str, values: Tensor) -> None:
        """Add values to a mean over this step's micro-batches, on this rank.

        `apply_gradient` logs it, or drops it with a step that is skipped.
        """
        total, n = self._means.get(name, (torch.zeros((), device=values.device), 0))
        self._means[name] = (total + values.detach().float().sum(), n + values.numel())

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
        means = {name: total / n for name, (total, n) in self._means.items()}
        self._means = {}
        # The one host synchronisation that Temper adds to a step, after all its work has been
        # queued: a step that must change nothing cannot be undone on the device, since optimizers
        # have state.
        if not torch.isfinite(torch.stack([norm, *norms])).all():
            self._skip_step()
            return False
        self.skipped_in_a_row = 0
        self.weights.assign(self.weights.clip(gradient, norm, self.max_grad_norm), skip)
        optimizer: Any = self.optimizers()
        with self.lost_updates.measured(self.weights, optimizer, gradient):
            optimizer.step()
        optimizer.zero_grad()
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()
        self.log_dict({"grad_norm": norm} | means)
        return True

    def _skip_step(self) -> None:
        self.skipped_in_a_row += 1
        self.skipped_steps += 1
        self.log("skipped_steps", float(self.skipped_steps))
        if self.skipped_in_a_row >= self.max_skipped_steps:
            raise RuntimeError(
                f"{self.skipped_in_a_row} steps in a row had a non-finite gradient (step"
                f" {self.global_step}): lower the learning rate (or alpha), or look at the data;"
                " model.init_args.max_skipped_steps sets the limit"
            )

    # -- hooks of Lightning

    def on_train_start(self) -> None:
        """Decide about packing, try the fused loss, and move the kept vectors of a checkpoint to
        the device.

        Raises:
            TemperError: packing or the fused loss was chosen, and the network cannot have it; rows
                are longer than its positions.
        """
        check_positions(self, trains=True)
        self.lost_updates = LostUpdates()
        self.packing.decide(self)
        if self.fused_loss:
            with self.trainer.precision_plugin.forward_context():
                output_layer(self.policy)
        self.kept = {name: vector.to(self.device) for name, vector in self.kept.items()}

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Add the lengths of rows that are to be packed, while they are on the host."""
        return self.packing.with_lengths(batch) if self.trainer.training else batch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the kept vectors.

        Raises:
            RuntimeError: the weights are displaced at the moment.
        """
        if self._weights is not None and self._weights.is_displaced:
            raise RuntimeError(
                "a checkpoint was requested while the weights are displaced; save after the"
                " training step"
            )
        if self.kept:
            checkpoint["vectors"] = {
                name: dict(zip(self.weights.names, vector, strict=True))
                for name, vector in self.kept.items()
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check names and shapes of the weights, and restore the kept vectors; an evaluation under
        FSDP2 or ZeRO reads none.
        """
        weights = {
            name.removeprefix(OURS): weight
            for name, weight in checkpoint.get("state_dict", {}).items()
        }
        if weights:  # sharded ones are read, and checked, by the strategy
            check_weights(self.trainer.ckpt_path or "", weights, self.policy)
        vectors = checkpoint.get("vectors", {})
        self.kept = {name: Vector(list(vector.values())) for name, vector in vectors.items()}

    # -- answers

    def on_validation_start(self) -> None:
        """Check, outside a fit, that prompts and answers fit the network's positions."""
        if self.trainer.state.fn != "fit":
            check_positions(self, trains=False)

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Greedy answers to the prompts of a batch, without the prompts: responses_BR."""
        return self.generate(batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """As `validation_step`."""
        return self.generate(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[str]:
        """Greedy answers as text."""
        texts: list[str] = self.datamodule.answer_texts(self.generate(batch))
        return texts

    def generate(self, batch: Batch) -> Tensor:
        """Greedy answers to prompts padded on the left: responses_BR (ids, padded on the right).

        They end at the stop tokens of the datamodule (`stop_ids`) and at all end tokens of the
        network.
        """
        data = self.datamodule
        longest = self.max_new_tokens or data.max_new_tokens
        # Where a forward pass gathers sharded weights, all ranks take part in every one.
        in_step = getattr(self.trainer.strategy, "shards_weights", False)
        ids = batch["input_ids"]
        mask = batch["attention_mask"]
        ends = end_tokens(self.policy, data.stop_ids or ())
        return generate_greedy(self.policy, ids, mask, longest, ends, in_step)
