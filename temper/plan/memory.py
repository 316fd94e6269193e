"""Memory of one device, by part, at every moment of a step that may be the fullest."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from temper.plan.activations import activations
from temper.plan.cost import Cost, Pass
from temper.plan.setup import FEW_BITS, Setup
from temper.plan.shapes import ModelShape, Weight, adapter_weights
from temper.plan.strategies import STRATEGIES, Cut, Sharding, elements

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
        return 0 if self.setup.offload_parameters else self.bytes_of((*self.trained, *self.frozen), self.sharding.weights)

    @cached_property
    def moments(self) -> list[Moment]:
        """Every pass, at the beginning and at the end of its backward part, and the optimizer's step."""
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
        optimizer = round(trained * (self.setup.state_bytes + 2 * VECTOR)) if self.setup.offload_optimizer else 0
        return optimizer + (self.bytes_of((*self.trained, *self.frozen), self.sharding.weights) if self.setup.offload_parameters else 0)

    # -- moments

    def _always(self) -> dict[str, int]:
        setup, trained = self.setup, self.count(self.trained, self.sharding.state)
        at_home = 0 if setup.offload_optimizer else 1
        casts = 2 * sum(x.inputs * x.outputs for x in self.shape.linears) if setup.casts_weights else 0
        return {
            "weights": self.local_weights,
            "exact weights": trained * VECTOR * at_home if self.sharding.exact else 0,
            "reference and other copies": self.cost.copies * self.bytes_of(self.shape.weights, self.sharding.weights),
            "optimizer state": round(trained * setup.state_bytes) * at_home if self.cost.optimizer else 0,
            "autocast's copies of weights": casts,
            "gathered weights": self._gathered(),
            # DistributedDataParallel makes them when it wraps the module, and objectives leave them unused.
            "DDP's own buckets": setup.trained_bytes * trained if self.sharding.flat_buffer else 0,
        }

    def _pass(self, each: Pass) -> Iterator[Moment]:
        setup, e = self.setup, self.setup.activation_bytes
        mine, micro = self.rows(each)
        found = activations(self.shape, setup, micro * each.sequences, each.gradient == "weights", each.lens)
        several = each.gradient == "weights" and micro < mine
        blocks = self.shape.layers if each.outputs == "all" else each.outputs
        tokens = mine * each.sequences * setup.sequence_length
        held = self._always() | {
            "vectors": each.vectors * self.vector,
            "saved weights": self.bytes_of(self.trained, self.sharding.state) if each.displaced else 0,
            "block outputs": blocks * tokens * self.shape.width * e,
        }
        if each.gradient == "none":
            yield Moment(each.name(), held | {"activations": found.working, "logits": found.logits})
            return
        begin = {"gradients": 0} | found.peak
        begin["gradients"] += self.vector if several else 0
        yield Moment(each.name(), held | begin)
        if each.gradient == "weights":
            more = {"gradients": self._gradients() + (self.vector if several else 0), "activations": self._last(found.layer), "logits": 0}
            yield Moment(f"{each.name()}, last layer", held | more | {"reduction buffers": self._buffers()})

    def _step(self) -> Moment:
        """The optimizer's step: on a GPU its foreach kernels make a temporary list, on a CPU two tensors at a time."""
        setup = self.setup
        vectors = self.cost.vectors + (self.cost.unreduced if self.sharding.flat_buffer else 0)
        largest = max((self.sharding.state(weight, setup.devices) for weight in self.trained), default=0)
        rounded = self.count(self.trained, self.sharding.state) * setup.trained_bytes if setup.trained_bytes < VECTOR else 0
        parts = {
            "gradients": self.vector + rounded,
            "vectors": vectors * self.vector,
            "optimizer's workspace": 2 * VECTOR * largest if setup.on_cpu else 0 if setup.offload_optimizer else self.vector,
        }
        return Moment("optimizer step", self._always() | parts)

    def _gradients(self) -> int:
        """Gradients at the end of a backward pass: autograd's, and this device's part as a vector where that is another tensor."""
        whole = self.count(self.trained, self.sharding.gradients) * self.setup.trained_bytes
        return whole + self.vector if self.sharding.exact else max(whole, self.vector)

    def _last(self, layer: int) -> int:
        """What is there beside all gradients at the end: the first layer's activations, for which its own gradients are still missing.

        With tied embeddings: at the very end a second gradient, of the embeddings as inputs, that is added to the first one.
        """
        names = {weight.name for weight in self.trained}
        first, head = self.shape.weights[0], next(x.name for x in self.shape.linears if x.place == "head")
        tied = all(weight.name != f"{head}.weight" for weight in self.shape.weights)
        missing = [weight for weight in self.trained if weight.layer == 0 or (weight is first and not tied)]
        again = VECTOR * first.size if tied and first.name in names else 0
        return max(layer - self.setup.trained_bytes * self.count(missing, self.sharding.gradients), again, 0)

    def _gathered(self) -> int:
        """What a strategy that cuts weights holds whole during a pass: all that is outside of the layers, and two layers."""
        if not self.sharding.gathers:
            return 0
        every = (*self.trained, *self.frozen)
        layers = [self.whole(weight for weight in every if weight.layer == layer) for layer in range(self.shape.layers)]
        return self.whole(weight for weight in every if weight.layer is None) + 2 * max(layers)

    def whole(self, weights: Iterable[Weight]) -> int:
        """Bytes of weights in one piece, as they are gathered."""
        chosen = list(weights)
        if self.setup.strategy == "fsdp2" and self.setup.gather_dtype:
            return sum(weight.size for weight in chosen) * (2 if self.setup.gather_dtype == "bfloat16" else 4)
        return self.bytes_of(chosen, lambda weight, devices: weight.size)

    def _buffers(self) -> int:
        """Where gradients are on their way to other devices."""
        setup = self.setup
        if self.sharding.flat_buffer:
            return self.vector
        if setup.strategy == "fsdp2":
            inside = [sum(w.size for w in self.trained if w.layer == layer) for layer in [None, *range(self.shape.layers)]]
            return VECTOR * max(inside)
        return 0 if setup.strategy == "auto" else min(setup.bucket_size, sum(w.size for w in self.trained)) * setup.trained_bytes
