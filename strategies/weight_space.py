"""The seam between objectives and strategies: gradients, displacement, assignment.

An objective that perturbs weights reads the same under every strategy:

    harmful_loss, harmful_grad = weights.gradient(loss, harmful)
    with weights.displaced(harmful_grad, -alpha / weights.norm(harmful_grad)):
        perturbed_loss, perturbed_grad = weights.gradient(loss, harmful, reduced=False)

`WeightSpace` is the space of one process that holds all weights. A strategy that shards or
replicates them overrides the few methods under "what a strategy may change". Vectors then hold this
rank's part of every parameter (its shard, possibly of no elements), never more.
"""

import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from temper.data import Batch, micro_batches
from temper.losses import MeanTerms

# MERGED from strategies.weight_space: A direction in weight space: one tensor per trainable
# parameter, this rank's part of it.


class Vector:
    """Tensors that are added and scaled as one, in place (a copy of 7B weights is 27 GB).

    Args:
        tensors: fp32 (fp64 for fp64 parameters), in the order of the weight space's parameters.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def add_(self, other: "Vector") -> "Vector":
        """``self + other``, in place."""
        torch._foreach_add_(self.tensors, other.tensors)
        return self

    def sub_(self, other: "Vector") -> "Vector":
        """``self - other``, in place."""
        torch._foreach_sub_(self.tensors, other.tensors)
        return self

    def mul_(self, factor: float | Tensor) -> "Vector":
        """``factor * self``, in place; a tensor factor costs no host synchronisation."""
        torch._foreach_mul_(self.tensors, factor)
        return self

    def to(self, device: torch.device) -> "Vector":
        """The same on a device."""
        return Vector([tensor.to(device) for tensor in self.tensors])

    def clone(self) -> "Vector":
        """A copy that shares nothing."""
        return Vector([tensor.clone() for tensor in self.tensors])


# MERGED from strategies.weight_space: Hold signals back while weights are not what they should be.
# |  | Lightning's SLURM handler saves a checkpoint from inside the signal handler, which Python
# runs | between any two lines. Blocking signals in this thread is not enough: another thread may
# take the | signal, and Python still runs the handler here. So the handlers themselves are
# exchanged.


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Record signals that have a Python handler; raise them again on leaving, in order of arrival.

    Signals with the default action keep it: one that ends the process saves nothing. Outside the
    main thread this does nothing, since Python runs handlers in the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def record(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)

    handlers = {
        s: signal.getsignal(s) for s in signal.valid_signals() if callable(signal.getsignal(s))
    }
    for number in handlers:
        signal.signal(number, record)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in arrived:
            signal.raise_signal(number)


# MERGED from strategies.weight_space: Whether weights went where a displacement should have taken
# them: low precision may be too coarse.


FAITHFUL = 0.99  # least cosine that passes without a warning


def step_products(
    parameters: Sequence[Tensor], before: Sequence[Tensor], direction: Vector, scale: Tensor | float
) -> Tensor:
    """``<s, m>``, ``<s, s>`` and ``<m, m>`` of the step ``s = scale * direction`` and what was made
    of it, m; to be summed over shards.
    """
    sums = []
    for parameter, start, step in zip(parameters, before, direction, strict=True):
        intended, made = step * scale, parameter.to(step) - start.to(step)
        sums.append(
            torch.stack([(intended * made).sum(), intended.square().sum(), made.square().sum()])
        )
    return torch.stack(sums).sum(0)


def checked_cosine(products: Tensor, parameters: Sequence[Tensor]) -> Tensor | None:
    """Cosine between a step and what was made of it, with a warning if it is low; None for a step
    of zeros or nan.

    Synchronises with the device. (bf16 has 8 bits: adding 0.1 / sqrt(7e9) to weights of 0.02 leaves
    most as they were.)
    """
    both, of_intended, of_made = products
    cosine = both / (of_intended.sqrt() * of_made.sqrt()).clamp_min(torch.finfo(both.dtype).tiny)
    if not (of_intended > 0 and cosine.isfinite()):
        return None
    if cosine < FAITHFUL:
        kinds = ", ".join(
            sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
        )
        rank_zero_warn(
            "the perturbation of the weights is not the one that was asked for: cosine"
            f" {float(cosine):.3f} between the two. Weights in {kinds} are too coarse for a step of"
            f" length {float(of_intended.sqrt()):.3g} over {sum(p.numel() for p in parameters):,}."
            " Train LoRA adapters (always fp32), or set model.init_args.network.dtype=float32 (and"
            " trainer.precision=bf16-mixed for speed)"
        )
    return cosine


Loss = Callable[[Batch], MeanTerms]


class WeightSpace:
    """Trainable weights of one process.

    Args:
        parameters: Trainable parameters by name. A parameter that is not here never moves.
        strategy: The Lightning strategy that holds them; not needed for one process.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], strategy: Strategy | None = None
    ) -> None:
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        self.strategy = strategy
        self.is_displaced = False
        self.displacement_cosine: Tensor | None = None  # of the first displacement: see `displaced`

    # -- what an objective uses

    def gradient(
        self, loss: Loss, batch: Batch, micro_batch_size: int | None = None, reduced: bool = True
    ) -> tuple[Tensor, Vector]:
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
        total, count = self.global_sum(
            torch.stack([torch.stack(totals).sum(), torch.stack(counts).sum()])
        )
        vector.mul_(self.world_size / count)
        return total / count, self.reduce(vector) if reduced else vector

    @contextmanager
    def displaced(self, direction: Vector, scale: Tensor | float) -> Iterator[None]:
        """Weights moved to ``w + scale * direction``; on leaving they are back bit for bit.

        Restored from a copy, also when the body raises: adding and subtracting the same step does
        not give the same bits. Python signal handlers wait until the weights are back, and
        `is_displaced` lets a checkpoint that is asked for meanwhile be refused.

        The first displacement is measured: weights of low precision may be too coarse to go where
        they should. `displacement_cosine` keeps the cosine between the step that was asked for and
        the one that was made.
        """
        with deferred_signals(), torch.no_grad():
            held = self._held()
            saved = [weights.detach().clone() for weights in held]
            self.is_displaced = True
            try:
                for weights, exact, step in zip(held, self._exact(), direction, strict=True):
                    # Summed in the vector's precision (and place: weights may be offloaded),
                    # rounded once to the weights'.
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
        """While it lasts, these parameters (None: all) get no gradient, and cost no activations
        where the strategy allows that.
        """
        learning = [
            p for p in (self.parameters if parameters is None else parameters) if p.requires_grad
        ]
        try:
            for parameter in learning:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)

    def clip(self, vector: Vector, norm: Tensor, max_norm: float | None) -> Vector:
        """Scale to ``max_norm`` where the norm exceeds it, as `torch.nn.utils.clip_grad_norm_`
        does.
        """
        return (
            vector if max_norm is None else vector.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        )

    def assign(self, vector: Vector, skip: Collection[str] = ()) -> None:
        """Make the vector the gradient that the optimizer sees; parameters named in ``skip`` get
        none.
        """
        for name, parameter, gradient in zip(self.names, self.parameters, vector, strict=True):
            parameter.grad = None if name in skip else gradient.to(parameter.dtype)

    def position(self) -> Vector:
        """A copy of the weights themselves, in the precision of vectors."""
        return Vector(
            [
                p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
                for p in self._exact()
            ]
        )

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
        """Sum of a small tensor over the ranks that hold different weights; the argument may be
        overwritten.
        """
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
        """This rank's part of the weights that forward passes use: written to, they move the
        network (after `_written`).
        """
        return list(self.parameters)

    def _exact(self) -> list[Tensor]:
        """The same part in the precision that the optimizer keeps."""
        return self._held()

    def _written(self) -> None:
        """What has to happen after `_held` was written to."""


def accumulated(vector: Vector | None, tensors: list[Tensor]) -> Vector:
    """A vector of these tensors, added to what is there."""
    return Vector(tensors) if vector is None else vector.add_(Vector(tensors))
