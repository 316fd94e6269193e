"""The weight space: gradients, displacement and assignment of trainable weights, which objectives
use under every strategy.

An objective that perturbs weights reads the same under every strategy:

    harmful_loss, harmful_grad = weights.gradient(loss, harmful)
    with weights.displaced(harmful_grad, -alpha / weights.norm(harmful_grad)):
        perturbed_loss, perturbed_grad = weights.gradient(loss, harmful, reduced=False)

`WeightSpace` is that of one process that holds all weights. A strategy that shards or replicates
them overrides the few methods under "what a strategy may change". A `Vector` is a direction in
weight space; under a strategy that shards, it holds this rank's shard of every parameter (possibly
of no elements), never more.

Two safeguards of a displacement are here too: `deferred_signals` keeps signal handlers from seeing
displaced weights, and `step_products` and `checked_cosine` measure whether weights of low precision
moved as intended.
"""

import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from temper.data import Batch, micro_batches
from temper.losses import MeanTerms

Loss = Callable[[Batch], MeanTerms]  # micro-batch -> numerator and denominator of the mean loss
LEAST_COSINE = 0.99  # of a displacement; less is warned about


class Vector:
    """A direction in weight space: tensors that are added and scaled together, in place (a copy of
    7B weights is 27 GB).

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
        """A copy on another device; tensors that are there already are shared."""
        return Vector([tensor.to(device) for tensor in self.tensors])

    def clone(self) -> "Vector":
        """A copy that shares no memory with this vector."""
        return Vector([tensor.clone() for tensor in self.tensors])


# -- the weight space


class WeightSpace:
    """Trainable weights of one process.

    Args:
        parameters: Trainable parameters by name. Others are never displaced or stepped.
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
        """Gradient of the global mean loss at the present weights.

        The loss is ``sum(total) / sum(count)`` over all micro-batches and ranks, so the micro-batch
        size and the number of ranks do not change the result. ``.grad`` is None before and after:
        gradients of several passes never add up by accident.

        Args:
            loss: Maps a micro-batch to the numerator and denominator of its mean.
            batch: This rank's rows.
            micro_batch_size: Rows per forward pass; None takes all at once.
            reduced: If False, ranks may be left with different vectors whose mean over ranks is
                the gradient; pass them through `reduce` before use. Saves one all-reduce.

        Returns:
            The loss (scalar, global mean, nats per unit of ``count``) and its gradient.

        Raises:
            ValueError: the batch has no rows.
        """
        for parameter in self.parameters:
            parameter.grad = None
        vector: Vector | None = None
        totals = []
        counts = []
        for rows in micro_batches(batch, micro_batch_size):
            terms = self._pass(loss, rows)
            totals.append(terms.total.detach())
            counts.append(terms.count.to(terms.total.dtype))
            vector = self._take_gradients(vector)
        if vector is None:
            raise ValueError("gradient of an empty batch: a stream returned no rows")
        total, count = self.global_sum(
            torch.stack([torch.stack(totals).sum(), torch.stack(counts).sum()])
        )
        vector.mul_(self.world_size / count)
        return total / count, self.reduce(vector) if reduced else vector

    @contextmanager
    def displaced(self, direction: Vector, scale: Tensor | float) -> Iterator[None]:
        """Weights moved to ``w + scale * direction``; on leaving they are restored bit for bit.

        Restored from a copy, also when the body raises: adding and subtracting the same step does
        not give the same bits. Python signal handlers wait until the weights are restored, and
        `is_displaced` lets a checkpoint that is requested meanwhile be refused.

        The first displacement is measured, since weights of low precision may be too coarse for the
        step: `displacement_cosine` keeps the cosine between the intended and the made step.
        """
        with deferred_signals(), torch.no_grad():
            local = self._local_weights()
            saved = [weight.detach().clone() for weight in local]
            self.is_displaced = True
            try:
                for weight, master, step in zip(
                    local, self._master_weights(), direction, strict=True
                ):
                    # Summed in the vector's precision (and on its device: weights may be
                    # offloaded), rounded once to the weight's.
                    weight.copy_(master.to(step).add(step * scale))
                if self.displacement_cosine is None:
                    products = step_products(local, saved, direction, scale)
                    self.displacement_cosine = checked_cosine(self.sum_over_shards(products), local)
                self._local_weights_changed()
                with torch.enable_grad():
                    yield
            finally:
                torch._foreach_copy_(local, saved)
                self._local_weights_changed()
                self.is_displaced = False

    @contextmanager
    def frozen(self, parameters: Iterable[nn.Parameter] | None = None) -> Iterator[None]:
        """Give these parameters (None: all) no gradient inside the context, and keep no activations
        for them where the strategy allows that.
        """
        chosen = self.parameters if parameters is None else parameters
        trainable = [parameter for parameter in chosen if parameter.requires_grad]
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def clip(self, vector: Vector, norm: Tensor, max_norm: float | None) -> Vector:
        """Scale to ``max_norm`` where the norm exceeds it, as `torch.nn.utils.clip_grad_norm_`
        does.
        """
        if max_norm is None:
            return vector
        return vector.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))

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
                for p in self._master_weights()
            ]
        )

    def master_weights(self) -> list[Tensor]:
        """This rank's shard of the weights in the optimizer's precision; no copies."""
        return self._master_weights()

    # -- what a strategy may change

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return 1

    def norm(self, vector: Vector) -> Tensor:
        """Global L2 norm over all trainable weights of a reduced vector."""
        norms = torch.stack(torch._foreach_norm(vector.tensors))
        norm: Tensor = torch.linalg.vector_norm(norms)
        return norm

    def reduce(self, vector: Vector) -> Vector:
        """Mean over ranks; the argument may be overwritten."""
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
        torch.autograd.backward(terms.total)
        return terms

    def _take_gradients(self, vector: Vector | None) -> Vector:
        """Add ``.grad`` to the vector of the earlier micro-batches, and empty it."""
        fresh = []
        for parameter in self.parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            fresh.append(gradient.to(torch.promote_types(gradient.dtype, torch.float32)))
            parameter.grad = None
        return accumulate(vector, fresh)

    def _local_weights(self) -> list[Tensor]:
        """This rank's shard of the weights that forward passes use. Call `_local_weights_changed`
        after writing to them.
        """
        return list(self.parameters)

    def _master_weights(self) -> list[Tensor]:
        """The same shard in the precision that the optimizer keeps."""
        return self._local_weights()

    def _local_weights_changed(self) -> None:
        """Let forward passes see weights that were written to `_local_weights`."""


def accumulate(vector: Vector | None, tensors: list[Tensor]) -> Vector:
    """The vector with these tensors added, in place; a new one if there is none yet."""
    return Vector(tensors) if vector is None else vector.add_(Vector(tensors))


# -- signals


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Record signals that have a Python handler; raise them again on leaving, in order of arrival.

    Lightning's SLURM handler saves a checkpoint from inside the handler, which Python runs between
    any two lines: without this, possibly a checkpoint of displaced weights. Signals with the
    default action keep it: one that ends the process saves nothing. Outside the main thread this
    does nothing, since Python runs handlers in the main thread only.
    """
    # Blocking signals in this thread is not enough: another thread may take the signal, and Python
    # still runs the handler here. So the handlers themselves are replaced.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def record(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)

    handlers = {
        s: signal.getsignal(s) for s in signal.valid_signals() if callable(signal.getsignal(s))
    }
    for handled in handlers:
        signal.signal(handled, record)
    try:
        yield
    finally:
        for handled, handler in handlers.items():
            signal.signal(handled, handler)
        for number in arrived:
            signal.raise_signal(number)


# -- precision of a displacement


def step_products(
    parameters: Sequence[Tensor], before: Sequence[Tensor], direction: Vector, scale: Tensor | float
) -> Tensor:
    """Inner products ``<s, m>``, ``<s, s>`` and ``<m, m>`` of the intended step ``s = scale *
    direction`` and the step m that the weights made; shape (3,), to be summed over shards.
    """
    sums = []
    for parameter, start, step in zip(parameters, before, direction, strict=True):
        intended = step * scale
        made = parameter.to(step) - start.to(step)
        sums.append(
            torch.stack([(intended * made).sum(), intended.square().sum(), made.square().sum()])
        )
    return torch.stack(sums).sum(0)


def checked_cosine(products: Tensor, parameters: Sequence[Tensor]) -> Tensor | None:
    """Cosine between the intended and the made step, with a warning if it is low; None for a step
    of zeros or nan.

    Synchronises with the device. (bf16 has 8 significant bits: adding 0.1 / sqrt(7e9) to weights
    of 0.02 leaves most unchanged.)
    """
    inner, intended_square, made_square = products.unbind()
    norms = intended_square.sqrt() * made_square.sqrt()
    cosine = inner / norms.clamp_min(torch.finfo(inner.dtype).tiny)
    if not (intended_square > 0 and cosine.isfinite()):
        return None
    if cosine < LEAST_COSINE:
        dtypes = ", ".join(
            sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
        )
        rank_zero_warn(
            "the weights did not move as given by the perturbation: cosine"
            f" {float(cosine):.3f} between the two. Weights in {dtypes} are too coarse for a step"
            f" of length {float(intended_square.sqrt()):.3g} over"
            f" {sum(p.numel() for p in parameters):,}."
            " Train LoRA adapters (always fp32), or set model.init_args.network.dtype=float32 (and"
            " trainer.precision=bf16-mixed for speed)"
        )
    return cosine
