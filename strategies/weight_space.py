"""The seam between objectives and strategies: gradients, displacement, assignment.

An objective that perturbs weights reads the same under every strategy:

    harmful_loss, harmful_grad = weights.gradient(loss, harmful)
    with weights.displaced(harmful_grad, -alpha / weights.norm(harmful_grad)):
        perturbed_loss, perturbed_grad = weights.gradient(loss, harmful, reduced=False)

`WeightSpace` is the space of one process that holds all weights. A strategy that shards or
replicates them overrides the few methods under "what a strategy may change". Vectors then hold this
rank's part of every parameter (its shard, possibly of no elements), never more.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from strategies.precision import checked_cosine, step_products
from strategies.signals import deferred_signals
from strategies.vector import Vector
from temper.data import Batch, micro_batches
from temper.losses import MeanTerms

Loss = Callable[[Batch], MeanTerms]


class WeightSpace:
    """Trainable weights of one process.

    Args:
        parameters: Trainable parameters by name. A parameter that is not here never moves.
        strategy: The Lightning strategy that holds them; not needed for one process.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], strategy: Strategy | None = None) -> None:
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        self.strategy = strategy
        self.is_displaced = False
        self.displacement_cosine: Tensor | None = None  # of the first displacement: see `displaced`

    # -- what an objective uses

    def gradient(self, loss: Loss, batch: Batch, micro_batch_size: int | None = None, reduced: bool = True) -> tuple[Tensor, Vector]:
        """Fresh gradient of the global mean loss at the present weights.

        ``sum(total) / sum(count)`` is taken over all micro-batches and ranks, so the micro-batch
        size and the number of ranks do not change the result. ``.grad`` is empty before and after:
        gradients of several passes can never add up by accident.

        Args:
            loss: Maps a micro-batch to the numerator and denominator of its mean.
            batch: This rank's rows.
            micro_batch_size: Rows per forward pass; None takes all at once.
            reduced: If False, ranks may be left with different vectors whose mean over ranks is
                the gradient; pass them through `reduce` before use. Saves one all-reduce.

        Returns:
            The loss (scalar, global mean, nats per unit of ``count``) and its gradient.
        """
        for parameter in self.parameters:
            parameter.grad = None
        vector: Vector | None = None
        totals, counts = [], []
        for rows in micro_batches(batch, micro_batch_size):
            terms = self._pass(loss, rows)
            totals.append(terms.total.detach())
            counts.append(terms.count.to(terms.total.dtype))
            vector = self._take_gradients(vector)
        if vector is None:
            raise ValueError("gradient of an empty batch: a stream handed out no rows")
        total, count = self.global_sum(torch.stack([torch.stack(totals).sum(), torch.stack(counts).sum()]))
        vector.mul_(self.world_size / count)
        return total / count, self.reduce(vector) if reduced else vector

    @contextmanager
    def displaced(self, direction: Vector, scale: Tensor | float) -> Iterator[None]:
        """Weights moved to ``w + scale * direction``; on leaving they are back bit for bit.

        Restored from a copy, also when the body raises: adding and subtracting the same step does
        not give the same bits. Python signal handlers wait until the weights are back, and
        `is_displaced` lets a checkpoint that is asked for meanwhile be refused.

        The first displacement is measured: weights of low precision may be too coarse to go where they should.
        `displacement_cosine` keeps the cosine between the step that was asked for and the one that was made.
        """
        with deferred_signals(), torch.no_grad():
            held = self._held()
            saved = [weights.detach().clone() for weights in held]
            self.is_displaced = True
            try:
                for weights, exact, step in zip(held, self._exact(), direction, strict=True):
                    # Summed in the vector's precision (and place: weights may be offloaded), rounded once to the weights'.
                    weights.copy_(exact.to(step).add(step * scale))
                if self.displacement_cosine is None:
                    products = step_products(held, saved, direction, scale)
                    self.displacement_cosine = checked_cosine(self.sum_over_shards(products), held)
                self._written()
                with torch.enable_grad():
                    yield
            finally:
                torch._foreach_copy_(held, saved)
                self._written()
                self.is_displaced = False

    @contextmanager
    def frozen(self, parameters: Iterable[nn.Parameter] | None = None) -> Iterator[None]:
        """While it lasts, these parameters (None: all) get no gradient, and cost no activations where the strategy allows that."""
        learning = [p for p in (self.parameters if parameters is None else parameters) if p.requires_grad]
        try:
            for parameter in learning:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)

    def clip(self, vector: Vector, norm: Tensor, max_norm: float | None) -> Vector:
        """Scale to ``max_norm`` where the norm exceeds it, as `torch.nn.utils.clip_grad_norm_` does."""
        return vector if max_norm is None else vector.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))

    def assign(self, vector: Vector, skip: Collection[str] = ()) -> None:
        """Make the vector the gradient that the optimizer sees; parameters named in ``skip`` get none."""
        for name, parameter, gradient in zip(self.names, self.parameters, vector, strict=True):
            parameter.grad = None if name in skip else gradient.to(parameter.dtype)

    def position(self) -> Vector:
        """A copy of the weights themselves, in the precision of vectors."""
        return Vector([p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in self._exact()])

    # -- what a strategy may change

    world_size = 1

    def norm(self, vector: Vector) -> Tensor:
        """Global L2 norm over all trainable weights of a reduced vector."""
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(vector.tensors)))

    def reduce(self, vector: Vector) -> Vector:
        """Mean over ranks; the argument may be consumed."""
        return vector

    def global_sum(self, values: Tensor) -> Tensor:
        """Sum of a small tensor over ranks; the argument may be overwritten."""
        return values

    def sum_over_shards(self, values: Tensor) -> Tensor:
        """Sum of a small tensor over the ranks that hold different weights; the argument may be overwritten."""
        return values

    def _pass(self, loss: Loss, rows: Batch) -> MeanTerms:
        """One forward and one backward pass over a micro-batch."""
        terms = loss(rows)
        terms.total.backward()
        return terms

    def _take_gradients(self, vector: Vector | None) -> Vector:
        """Move ``.grad`` into the vector, adding to what earlier micro-batches left there."""
        fresh = []
        for parameter in self.parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            fresh.append(gradient.to(torch.promote_types(gradient.dtype, torch.float32)))
            parameter.grad = None
        return accumulated(vector, fresh)

    def _held(self) -> list[Tensor]:
        """This rank's part of the weights that forward passes use: written to, they move the network (after `_written`)."""
        return list(self.parameters)

    def _exact(self) -> list[Tensor]:
        """The same part in the precision that the optimizer keeps."""
        return self._held()

    def _written(self) -> None:
        """What has to happen after `_held` was written to."""


def accumulated(vector: Vector | None, tensors: list[Tensor]) -> Vector:
    """A vector of these tensors, added to what is there."""
    return Vector(tensors) if vector is None else vector.add_(Vector(tensors))
