"""Memory of one device, by part, at every moment of a step that may be the fullest."""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from temper.plan.cost import FEW_BITS, Cost, Pass, Setup
from temper.plan.shapes import Linear, ModelShape, Weight, adapted, adapter_weights

# MERGED from temper.plan.memory: How much state an optimizer keeps per weight, by trying it on a
# small one.


# a matrix of SIZE x SIZE: large enough that 8-bit optimizers use 8 bits, and that their tables do
# not count
SIZE = 512


def state_bytes(
    make: Callable[[Any], torch.optim.Optimizer], dtype: torch.dtype = torch.float32
) -> float:
    """Bytes of optimizer state per trained weight, after a step.

    Args:
        make: Makes the optimizer of a list of parameters.
        dtype: Of the weights.
    """
    weight = nn.Parameter(torch.zeros(SIZE, SIZE, dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # paged optimizers say that there is no GPU here
        optimizer = make([weight])
        weight.grad = torch.full_like(weight, 1e-3)
        optimizer.step()
    kept = {
        value.data_ptr(): value for value in _tensors(optimizer.state[weight]) if value.numel() > 1
    }
    return sum(value.numel() * value.element_size() for value in kept.values()) / SIZE**2


def _tensors(state: Any) -> list[Tensor]:
    values = (
        state.values()
        if isinstance(state, dict)
        else state
        if isinstance(state, (list, tuple))
        else []
    )
    return (
        [state]
        if isinstance(state, Tensor)
        else [tensor for value in values for tensor in _tensors(value)]
    )


# MERGED from temper.plan.memory: What every strategy cuts into one part per device, and how much of
# a tensor that is.


Cut = Callable[[Weight, int], int]


def whole(weight: Weight, devices: int) -> int:
    """Elements on a device: all."""
    return weight.size


def by_rows(weight: Weight, devices: int) -> int:
    """FSDP2 cuts the first dimension; the first ranks have the larger parts."""
    return -(-weight.rows // devices) * (weight.size // weight.rows)


def flat(weight: Weight, devices: int) -> int:
    """DeepSpeed cuts the elements in a row, padded to equal parts."""
    return -(-weight.size // devices)


@dataclass(frozen=True)
class Sharding:
    """How a strategy holds what training needs.

    Attributes:
        weights: Of a weight, elements on a device between passes.
        gradients: Of a gradient.
        state: Of the optimizer's state, and of vectors and copies of the trained weights.
        exact: Float32 copies of the trained weights beside them (DeepSpeed).
        in_passes: Gradients are reduced in every backward pass, not once per step.
        flat_buffer: Reducing makes another vector.
        returns: After a step (and a displacement) the trained weights are gathered again.
    """

    weights: Cut = whole
    gradients: Cut = whole
    state: Cut = whole
    exact: bool = False
    in_passes: bool = True
    flat_buffer: bool = False
    returns: bool = False

    @property
    def gathers(self) -> bool:
        """Weights are gathered layer by layer for every pass."""
        return self.weights is not whole


STRATEGIES: dict[str, Sharding] = {
    "auto": Sharding(in_passes=False),
    "ddp": Sharding(in_passes=False, flat_buffer=True),
    "fsdp2": Sharding(by_rows, by_rows, by_rows),
    "zero1": Sharding(whole, whole, flat, exact=True, returns=True),
    "zero2": Sharding(whole, flat, flat, exact=True, returns=True),
    "zero3": Sharding(flat, flat, flat, exact=True),
}


def elements(weights: Iterable[Weight], cut: Cut, devices: int) -> int:
    """Elements of some weights on one device: the one that has most."""
    return sum(cut(weight, devices) for weight in weights)


# MERGED from temper.plan.memory: What a forward pass keeps for the backward pass, in bytes, as
# transformers' decoders compute today. |  | Counted per token of a micro-batch: `D` width, `I`
# width inside the MLP, `Q` heads times their width, `V` vocabulary, | `T` tokens in a row, `e`
# bytes of an activation. A test holds the terms against what autograd saves.


FLOAT = 4


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch.

    Attributes:
        kept: For the backward pass, over all layers, with the setup's choice about checkpointing.
        layer: One layer's, with the short-lived tensors of its backward pass.
        working: Of a layer, what its backward pass adds to what is kept: those tensors, and what
            checkpointing computes again.
        logits: Around the loss, at its peak: what it keeps and its short-lived tensors; as if every
            token were labelled.
        head: Gradient of the output layer's weights, which is there when the backward pass of the
            layers begins.
    """

    kept: int
    layer: int
    working: int
    logits: int
    head: int = 0

    @property
    def peak(self) -> dict[str, int]:
        """The beginning of the backward pass: either at the loss, or in the last layer."""
        if self.logits >= self.working + self.head:
            return {"activations": self.kept, "logits": self.logits}
        return {"activations": self.kept + self.working, "logits": 0, "gradients": self.head}


def activations(
    shape: ModelShape, setup: Setup, rows: int, learns: bool = True, lens: bool = False
) -> Activations:
    """Activations of a micro-batch.

    Args:
        shape: The network.
        setup: Precision, checkpointing, adapter, length of rows.
        rows: Sequences in the micro-batch.
        learns: Gradients of weights are taken; if not, linear layers keep nothing.
        lens: Logits are computed from every hidden state.
    """
    tokens, e, full = (
        rows * setup.sequence_length,
        setup.activation_bytes,
        learns and setup.lora is None,
    )
    layer = tokens * _layer(shape, setup, learns)
    inner = _first(shape, "mlp_out").inputs
    short_lived = tokens * (inner * e + shape.width * (FLOAT + e)) + _dequantised(shape, setup)
    residual = FLOAT if setup.precision == "bf16-mixed" and setup.dtype == "float32" else e
    kept = shape.layers * (
        tokens * shape.width * residual if setup.activation_checkpointing else layer
    )
    kept += tokens * shape.width * (FLOAT + (2 * e if full else 0))  # final norm and output layer
    working = short_lived + (layer if setup.activation_checkpointing else 0)
    states = shape.layers + 1 if lens else 1
    logits = tokens * (
        _loss(shape, setup) + (states - 1) * FLOAT * shape.vocabulary
    ) + _fused_weights(shape, setup, full)
    return Activations(
        kept, layer + short_lived, working, logits, FLOAT * shape.vocabulary * shape.width * full
    )


def _layer(shape: ModelShape, setup: Setup, learns: bool) -> int:
    """Of one decoder layer, per token."""
    e, full = setup.activation_bytes, learns and setup.lora is None
    q, inner = _first(shape, "attention_out").inputs, _first(shape, "mlp_out").inputs
    # In float32; where their weights learn, the normalised values too.
    norms = shape.norms * (shape.width * (FLOAT + (e if full else 0)) + FLOAT)
    gated = sum(x.layer == 0 and x.place == "mlp_in" for x in shape.linears) > 1
    mlp = (
        (3 if gated else 6) * inner * e
    )  # gate, up, act(gate); an activation written in steps keeps more
    return norms + _attention(shape, setup, q) + mlp + (_inputs(shape, setup) if learns else 0)


def _attention(shape: ModelShape, setup: Setup, q: int) -> int:
    """Queries, keys and values (repeated for every head), outputs; the row of scores, or of its
    mask.
    """
    e, length = setup.activation_bytes, setup.sequence_length
    if setup.attention == "eager" or shape.capped:
        scores = (
            FLOAT + (e if e < FLOAT else 0) + (e if shape.capped else 0)
        )  # softmax in float32, rounded, before the cap
        return 4 * q * e + shape.heads * length * scores
    return 4 * q * e + shape.heads * FLOAT + length * e


def _inputs(shape: ModelShape, setup: Setup) -> int:
    """Inputs of linear layers that learn, or whose adapter does."""
    first = [linear for linear in shape.linears if linear.layer == 0]
    if setup.lora is None:
        return _shared(first, setup)
    names = {linear.name for linear in adapted(shape, setup.lora)}
    chosen = [linear for linear in first if linear.name in names]
    width = 2 if setup.precision == "bf16-mixed" else FLOAT
    ranks = len(chosen) * setup.lora.rank * width
    if setup.precision == "32-true" and setup.activation_bytes == FLOAT:
        return ranks + _shared(chosen, setup)
    return (
        ranks + sum(linear.inputs for linear in chosen) * width
    )  # every adapter converts its input for itself


def _shared(chosen: list[Linear], setup: Setup) -> int:
    """Layers with the same input keep it once; that of the attention's output is kept anyway.
    Autocast converts for each.
    """
    found: dict[object, int] = {}
    for linear in chosen:
        if linear.place != "attention_out":
            found[linear.name if setup.casts_weights else linear.place] = linear.inputs
    return sum(found.values()) * setup.activation_bytes


def _loss(shape: ModelShape, setup: Setup) -> int:
    """Per token: logits, their float32 copy, log-probabilities; in the backward pass the gradients
    of both.
    """
    if setup.fused_loss:
        return (
            3 * FLOAT * shape.width
        )  # float32 hidden states, their gradient, and a chunk of logits of the same size
    capped = shape.vocabulary * setup.activation_bytes if shape.capped else 0
    return 3 * FLOAT * shape.vocabulary + capped


def _fused_weights(shape: ModelShape, setup: Setup, full: bool) -> int:
    """The fused loss reads a float32 output matrix, and makes its gradient while all activations
    are there.
    """
    matrices = (setup.weight_bytes < FLOAT) + full
    return matrices * FLOAT * shape.vocabulary * shape.width if setup.fused_loss else 0


def _dequantised(shape: ModelShape, setup: Setup) -> int:
    """A layer of few bits is multiplied as a whole matrix of 16 or 32."""
    if not setup.quantization:
        return 0
    return setup.activation_bytes * max(
        linear.inputs * linear.outputs for linear in shape.linears if linear.place != "head"
    )


def _first(shape: ModelShape, place: str) -> Linear:
    return next(linear for linear in shape.linears if linear.place == place)


VECTOR = 4  # bytes of an element: vectors, exact weights and reduced gradients are float32


@dataclass(frozen=True)
class Moment:
    """What is alive at one moment.

    Attributes:
        name: Which moment.
        parts: Bytes by part.
    """

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())


class Memory:
    """Memory of a device in a step of an objective.

    Args:
        shape: The network.
        setup: What was asked for.
        cost: What the objective says of its step.
    """

    def __init__(self, shape: ModelShape, setup: Setup, cost: Cost) -> None:
        self.shape, self.setup, self.cost = shape, setup, cost
        self.sharding: Sharding = STRATEGIES[setup.strategy]
        extra = adapter_weights(shape, setup.lora) if setup.lora else ()
        learns: Callable[[Weight], bool] = lambda weight: weight.adapter or setup.lora is None  # noqa: E731
        if cost.trains is not None:
            pattern = re.compile(cost.trains)
            learns = lambda weight: bool(pattern.search(weight.name))  # noqa: E731
        every = (*shape.weights, *extra)
        self.trained = tuple(weight for weight in every if cost.optimizer and learns(weight))
        self.frozen = tuple(weight for weight in every if not (cost.optimizer and learns(weight)))

    # -- sizes on this device

    def count(self, weights: Iterable[Weight], cut: Cut) -> int:
        """Elements of weights on this device."""
        return elements(weights, cut, self.setup.devices)

    def bytes_of(self, weights: Iterable[Weight], cut: Cut) -> int:
        """Bytes of weights on this device, as they are held."""
        setup, held = self.setup, 0.0
        for weight in weights:
            few = FEW_BITS[setup.quantization] if setup.quantization and weight.quantised else None
            whole = setup.trained_bytes if weight.adapter else setup.weight_bytes
            held += cut(weight, setup.devices) * (few or whole)
        return math.ceil(held)

    def rows(self, each: Pass) -> tuple[int, int]:
        """Rows of a pass on this device: in a step, and in a micro-batch."""
        mine = max(1, math.ceil(self.setup.rows(each.stream) * each.share))
        return mine, min(self.setup.micro_batch_size or mine, mine)

    @cached_property
    def vector(self) -> int:
        """A float32 vector, this device's part."""
        return VECTOR * self.count(self.trained, self.sharding.state)

    @cached_property
    def local_weights(self) -> int:
        """Weights between passes."""
        return (
            0
            if self.setup.offload_parameters
            else self.bytes_of((*self.trained, *self.frozen), self.sharding.weights)
        )

    @cached_property
    def moments(self) -> list[Moment]:
        """Every pass, at the beginning and at the end of its backward part, and the optimizer's
        step.
        """
        found = [moment for each in self.cost.passes for moment in self._pass(each)]
        return [*found, self._step()] if self.cost.optimizer else found

    @property
    def peak(self) -> Moment:
        """The fullest moment."""
        return max(self.moments, key=lambda moment: moment.total)

    @cached_property
    def host(self) -> int:
        """Bytes in the host's memory for this device: what is offloaded."""
        trained = self.count(self.trained, self.sharding.state)
        optimizer = (
            round(trained * (self.setup.state_bytes + 2 * VECTOR))
            if self.setup.offload_optimizer
            else 0
        )
        return optimizer + (
            self.bytes_of((*self.trained, *self.frozen), self.sharding.weights)
            if self.setup.offload_parameters
            else 0
        )

    # -- moments

    def _always(self) -> dict[str, int]:
        setup, trained = self.setup, self.count(self.trained, self.sharding.state)
        at_home = 0 if setup.offload_optimizer else 1
        casts = (
            2 * sum(x.inputs * x.outputs for x in self.shape.linears) if setup.casts_weights else 0
        )
        return {
            "weights": self.local_weights,
            "exact weights": trained * VECTOR * at_home if self.sharding.exact else 0,
            "reference and other copies": (
                self.cost.copies * self.bytes_of(self.shape.weights, self.sharding.weights)
            ),
            "optimizer state": (
                round(trained * setup.state_bytes) * at_home if self.cost.optimizer else 0
            ),
            "autocast's copies of weights": casts,
            "gathered weights": self._gathered(),
            # DistributedDataParallel makes them when it wraps the module, and objectives leave them
            # unused.
            "DDP's own buckets": setup.trained_bytes * trained if self.sharding.flat_buffer else 0,
        }

    def _pass(self, each: Pass) -> Iterator[Moment]:
        setup, e = self.setup, self.setup.activation_bytes
        mine, micro = self.rows(each)
        found = activations(
            self.shape, setup, micro * each.sequences, each.gradient == "weights", each.lens
        )
        several = each.gradient == "weights" and micro < mine
        blocks = self.shape.layers if each.outputs == "all" else each.outputs
        tokens = mine * each.sequences * setup.sequence_length
        held = self._always() | {
            "vectors": each.vectors * self.vector,
            "saved weights": (
                self.bytes_of(self.trained, self.sharding.state) if each.displaced else 0
            ),
            "block outputs": blocks * tokens * self.shape.width * e,
        }
        if each.gradient == "none":
            yield Moment(each.name(), held | {"activations": found.working, "logits": found.logits})
            return
        begin = {"gradients": 0} | found.peak
        begin["gradients"] += self.vector if several else 0
        yield Moment(each.name(), held | begin)
        if each.gradient == "weights":
            more = {
                "gradients": self._gradients() + (self.vector if several else 0),
                "activations": self._last(found.layer),
                "logits": 0,
            }
            yield Moment(
                f"{each.name()}, last layer", held | more | {"reduction buffers": self._buffers()}
            )

    def _step(self) -> Moment:
        """The optimizer's step: on a GPU its foreach kernels make a temporary list, on a CPU two
        tensors at a time.
        """
        setup = self.setup
        vectors = self.cost.vectors + (self.cost.unreduced if self.sharding.flat_buffer else 0)
        largest = max(
            (self.sharding.state(weight, setup.devices) for weight in self.trained), default=0
        )
        rounded = (
            self.count(self.trained, self.sharding.state) * setup.trained_bytes
            if setup.trained_bytes < VECTOR
            else 0
        )
        parts = {
            "gradients": self.vector + rounded,
            "vectors": vectors * self.vector,
            "optimizer's workspace": (
                2 * VECTOR * largest
                if setup.on_cpu
                else 0
                if setup.offload_optimizer
                else self.vector
            ),
        }
        return Moment("optimizer step", self._always() | parts)

    def _gradients(self) -> int:
        """Gradients at the end of a backward pass: autograd's, and this device's part as a vector
        where that is another tensor.
        """
        whole = self.count(self.trained, self.sharding.gradients) * self.setup.trained_bytes
        return whole + self.vector if self.sharding.exact else max(whole, self.vector)

    def _last(self, layer: int) -> int:
        """What is there beside all gradients at the end: the first layer's activations, for which
        its own gradients are still missing.

        With tied embeddings: at the very end a second gradient, of the embeddings as inputs, that
        is added to the first one.
        """
        names = {weight.name for weight in self.trained}
        first, head = (
            self.shape.weights[0],
            next(x.name for x in self.shape.linears if x.place == "head"),
        )
        tied = all(weight.name != f"{head}.weight" for weight in self.shape.weights)
        missing = [
            weight for weight in self.trained if weight.layer == 0 or (weight is first and not tied)
        ]
        again = VECTOR * first.size if tied and first.name in names else 0
        return max(
            layer - self.setup.trained_bytes * self.count(missing, self.sharding.gradients),
            again,
            0,
        )

    def _gathered(self) -> int:
        """What a strategy that cuts weights holds whole during a pass: all that is outside of the
        layers, and two layers.
        """
        if not self.sharding.gathers:
            return 0
        every = (*self.trained, *self.frozen)
        layers = [
            self.whole(weight for weight in every if weight.layer == layer)
            for layer in range(self.shape.layers)
        ]
        return self.whole(weight for weight in every if weight.layer is None) + 2 * max(layers)

    def whole(self, weights: Iterable[Weight]) -> int:
        """Bytes of weights in one piece, as they are gathered."""
        chosen = list(weights)
        if self.setup.strategy == "fsdp2" and self.setup.gather_dtype:
            return sum(weight.size for weight in chosen) * (
                2 if self.setup.gather_dtype == "bfloat16" else 4
            )
        return self.bytes_of(chosen, lambda weight, devices: weight.size)

    def _buffers(self) -> int:
        """Where gradients are on their way to other devices."""
        setup = self.setup
        if self.sharding.flat_buffer:
            return self.vector
        if setup.strategy == "fsdp2":
            inside = [
                sum(w.size for w in self.trained if w.layer == layer)
                for layer in [None, *range(self.shape.layers)]
            ]
            return VECTOR * max(inside)
        return (
            0
            if setup.strategy == "auto"
            else min(setup.bucket_size, sum(w.size for w in self.trained)) * setup.trained_bytes
        )
