"""Memory of one device in a training step, by component, at each phase where it may peak."""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from temper.plan.activations import estimate_activations
from temper.plan.cost import FLOAT32_BYTES, QUANTIZED_BYTES, Cost, Pass, Setup
from temper.plan.shapes import ModelShape, Weight, adapter_weights

# -- optimizer state

# The measured weight is SIZE x SIZE: large enough that 8-bit optimizers quantize its state, and
# that their lookup tables do not matter.
SIZE = 512


def measure_state_bytes(
    make: Callable[[Any], torch.optim.Optimizer], dtype: torch.dtype = torch.float32
) -> float:
    """Bytes of optimizer state per trained weight, measured after a step on a small weight.

    Args:
        make: Returns the optimizer of a list of parameters.
        dtype: Dtype of the weight.
    """
    weight = nn.Parameter(torch.zeros(SIZE, SIZE, dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # paged optimizers warn that there is no GPU
        optimizer = make([weight])
        weight.grad = torch.full_like(weight, 1e-3)
        optimizer.step()
    state = {
        tensor.data_ptr(): tensor
        for tensor in _tensors_in(optimizer.state[weight])
        if tensor.numel() > 1
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values()) / SIZE**2


def _tensors_in(state: Any) -> list[Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        state = list(state.values())
    if not isinstance(state, (list, tuple)):
        return []
    return [tensor for value in state for tensor in _tensors_in(value)]


# -- sharding

ShardSize = Callable[[Weight, int], int]  # (weight, devices) -> elements on the first device


def replicated(weight: Weight, devices: int) -> int:
    """Elements of a weight that every device holds whole."""
    return weight.size


def row_shard(weight: Weight, devices: int) -> int:
    """Elements of FSDP2's largest shard: it shards the first dimension, in chunks rounded up."""
    return -(-weight.rows // devices) * (weight.size // weight.rows)


def flat_shard(weight: Weight, devices: int) -> int:
    """Elements of DeepSpeed's shards: equal ranges of the flattened weight, padded."""
    return -(-weight.size // devices)


@dataclass(frozen=True)
class Sharding:
    """How a strategy shards the tensors of training.

    Attributes:
        weights: Shard size of weights between passes.
        gradients: Shard size of gradients.
        state: Shard size of optimizer state, and of vectors and copies of the trained weights.
        master_weights: Whether there are float32 master weights beside the weights (DeepSpeed).
        reduces_every_pass: Whether each backward pass reduces its gradients, instead of the
            objective once per step.
        ddp_buffers: Whether DistributedDataParallel's buckets exist, and reducing a gradient
            allocates a new vector.
    """

    weights: ShardSize = replicated
    gradients: ShardSize = replicated
    state: ShardSize = replicated
    master_weights: bool = False
    reduces_every_pass: bool = True
    ddp_buffers: bool = False

    @property
    def gathers_weights(self) -> bool:
        """Whether weights are gathered layer by layer in every pass."""
        return self.weights is not replicated


STRATEGIES: dict[str, Sharding] = {
    "auto": Sharding(reduces_every_pass=False),
    "ddp": Sharding(reduces_every_pass=False, ddp_buffers=True),
    "fsdp2": Sharding(row_shard, row_shard, row_shard),
    "zero1": Sharding(replicated, replicated, flat_shard, master_weights=True),
    "zero2": Sharding(replicated, flat_shard, flat_shard, master_weights=True),
    "zero3": Sharding(flat_shard, flat_shard, flat_shard, master_weights=True),
}


# -- memory of a step


@dataclass(frozen=True)
class Phase:
    """Memory at one phase of a step.

    Attributes:
        name: Name of the phase.
        components: Bytes by component.
    """

    name: str
    components: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all components."""
        return sum(self.components.values())


class Memory:
    """Memory of the device with the largest shards in one step of an objective.

    Args:
        shape: Shape of the network.
        setup: Settings of the run.
        cost: Cost of the objective's step.
    """

    def __init__(self, shape: ModelShape, setup: Setup, cost: Cost) -> None:
        self.shape = shape
        self.setup = setup
        self.cost = cost
        self.sharding: Sharding = STRATEGIES[setup.strategy]
        adapter = adapter_weights(shape, setup.lora) if setup.lora else ()
        self.weights = (*shape.weights, *adapter)
        self.trained = tuple(weight for weight in self.weights if self._is_trained(weight))
        self.frozen = tuple(weight for weight in self.weights if not self._is_trained(weight))

    def _is_trained(self, weight: Weight) -> bool:
        if not self.cost.optimizer:
            return False
        if self.cost.trains is not None:
            return bool(re.search(self.cost.trains, weight.name))
        return weight.adapter or self.setup.lora is None

    # -- sizes on this device

    def count(self, weights: Iterable[Weight], shard_size: ShardSize) -> int:
        """Elements of weights on this device."""
        return sum(shard_size(weight, self.setup.devices) for weight in weights)

    def bytes_of(self, weights: Iterable[Weight], shard_size: ShardSize) -> int:
        """Bytes of weights on this device, in their own dtype or quantization."""
        total = 0.0
        for weight in weights:
            per_element: float = self.setup.weight_bytes
            if self.setup.quantization and weight.quantized:
                per_element = QUANTIZED_BYTES[self.setup.quantization]
            elif weight.adapter:
                per_element = self.setup.trained_bytes
            total += shard_size(weight, self.setup.devices) * per_element
        return math.ceil(total)

    def gathered_bytes(self, weights: Iterable[Weight]) -> int:
        """Bytes of whole weights, as a sharded strategy gathers them."""
        chosen = list(weights)
        if self.setup.strategy == "fsdp2" and self.setup.gather_dtype:
            element = 2 if self.setup.gather_dtype == "bfloat16" else FLOAT32_BYTES
            return element * sum(weight.size for weight in chosen)
        return self.bytes_of(chosen, replicated)

    def rows(self, each: Pass) -> tuple[int, int]:
        """Rows of a pass on this device: per optimizer step, and per micro-batch."""
        per_step = max(1, math.ceil(self.setup.rows_per_device(each.stream) * each.share))
        return per_step, min(self.setup.micro_batch_size or per_step, per_step)

    @cached_property
    def vector(self) -> int:
        """Bytes of this device's shard of a float32 vector of the size of the trained weights."""
        return FLOAT32_BYTES * self.count(self.trained, self.sharding.state)

    @cached_property
    def local_weights(self) -> int:
        """Bytes of weights on this device between passes."""
        if self.setup.offload_parameters:
            return 0
        return self.bytes_of(self.weights, self.sharding.weights)

    @cached_property
    def phases(self) -> list[Phase]:
        """Phases in order: start and end of each backward pass, then the optimizer's step."""
        phases = [phase for each in self.cost.passes for phase in self._pass_phases(each)]
        if self.cost.optimizer:
            phases.append(self._optimizer_phase())
        return phases

    @property
    def peak(self) -> Phase:
        """The phase that needs the most memory."""
        return max(self.phases, key=lambda phase: phase.total)

    @cached_property
    def host(self) -> int:
        """Bytes in host memory per device: what is offloaded."""
        offloaded = 0
        if self.setup.offload_optimizer:  # state, master weights and gradients
            trained = self.count(self.trained, self.sharding.state)
            offloaded += round(trained * (self.setup.state_bytes + 2 * FLOAT32_BYTES))
        if self.setup.offload_parameters:
            offloaded += self.bytes_of(self.weights, self.sharding.weights)
        return offloaded

    # -- phases

    def _permanent(self) -> dict[str, int]:
        """Components that are alive in every phase."""
        setup = self.setup
        trained = self.count(self.trained, self.sharding.state)
        on_device = not setup.offload_optimizer
        has_master_weights = self.sharding.master_weights and on_device
        has_state = self.cost.optimizer and on_device
        linear = sum(x.inputs * x.outputs for x in self.shape.linears)
        return {
            "weights": self.local_weights,
            "float32 master weights": trained * FLOAT32_BYTES if has_master_weights else 0,
            "reference and other model copies": (
                self.cost.copies * self.bytes_of(self.shape.weights, self.sharding.weights)
            ),
            "optimizer state": round(trained * setup.state_bytes) if has_state else 0,
            "autocast weight copies": 2 * linear if setup.casts_weights else 0,
            "gathered weights": self._gathered_weights(),
            # DistributedDataParallel allocates them when it wraps the module; objectives reduce
            # gradients themselves and leave them unused.
            "DDP buckets": setup.trained_bytes * trained if self.sharding.ddp_buffers else 0,
        }

    def _pass_phases(self, each: Pass) -> Iterator[Phase]:
        """Phases of a pass: the forward pass, or the start and the end of the backward pass."""
        setup = self.setup
        per_step, per_micro_batch = self.rows(each)
        takes_weight_gradient = each.gradient == "weights"
        activations = estimate_activations(
            self.shape, setup, per_micro_batch * each.sequences, takes_weight_gradient, each.lens
        )
        blocks = self.shape.layers if each.outputs == "all" else each.outputs
        tokens = per_step * each.sequences * setup.sequence_length
        saved = self.bytes_of(self.trained, self.sharding.state) if each.displaced else 0
        held = self._permanent() | {
            "extra float32 vectors": each.vectors * self.vector,
            "saved weights": saved,
            "block outputs": blocks * tokens * self.shape.width * setup.activation_bytes,
        }
        if each.gradient == "none":
            forward = {"activations": activations.backward, "logits": activations.logits}
            yield Phase(each.label(), held | forward)
            return
        # Micro-batches accumulate their gradients in a float32 vector.
        accumulates = takes_weight_gradient and per_micro_batch < per_step
        accumulated = self.vector if accumulates else 0
        start = {"gradients": 0} | activations.peak
        start["gradients"] += accumulated
        yield Phase(each.label(), held | start)
        if takes_weight_gradient:
            end = {
                "gradients": self._gradients() + accumulated,
                "activations": self._first_layer_activations(activations.layer),
                "logits": 0,
                "reduction buffers": self._reduction_buffers(),
            }
            yield Phase(f"{each.label()}, end of backward", held | end)

    def _optimizer_phase(self) -> Phase:
        """The optimizer's step. On a GPU its foreach kernels allocate a temporary list of all
        tensors; on a CPU it needs two temporary tensors at a time.
        """
        setup = self.setup
        vectors = self.cost.vectors + (self.cost.unreduced if self.sharding.ddp_buffers else 0)
        gradients = self.vector
        if setup.trained_bytes < FLOAT32_BYTES:  # rounded to the dtype of the weights
            gradients += setup.trained_bytes * self.count(self.trained, self.sharding.state)
        shards = (self.sharding.state(weight, setup.devices) for weight in self.trained)
        if setup.on_cpu:
            workspace = 2 * FLOAT32_BYTES * max(shards, default=0)
        else:
            workspace = 0 if setup.offload_optimizer else self.vector
        components = {
            "gradients": gradients,
            "extra float32 vectors": vectors * self.vector,
            "optimizer workspace": workspace,
        }
        return Phase("optimizer step", self._permanent() | components)

    def _gradients(self) -> int:
        """Gradients at the end of a backward pass: autograd's, and this device's float32 shard,
        where that is another tensor.
        """
        autograd = self.count(self.trained, self.sharding.gradients) * self.setup.trained_bytes
        if self.sharding.master_weights:
            return autograd + self.vector
        return max(autograd, self.vector)

    def _first_layer_activations(self, layer: int) -> int:
        """Activations at the end of a backward pass, less the gradients that do not exist yet.

        The backward pass ends in the first layer, whose activations are alive while its own
        gradients are still missing. With tied embeddings there is a second gradient at the very
        end: that of the input embeddings, before it is added to the output layer's.
        """
        embeddings = self.shape.weights[0]
        head = next(x.name for x in self.shape.linears if x.place == "head")
        tied = all(weight.name != f"{head}.weight" for weight in self.shape.weights)
        missing = [
            weight
            for weight in self.trained
            if weight.layer == 0 or (weight is embeddings and not tied)
        ]
        missing_bytes = self.setup.trained_bytes * self.count(missing, self.sharding.gradients)
        trains_embeddings = any(weight.name == embeddings.name for weight in self.trained)
        second_gradient = FLOAT32_BYTES * embeddings.size if tied and trains_embeddings else 0
        return max(layer - missing_bytes, second_gradient, 0)

    def _gathered_weights(self) -> int:
        """Weights that a sharded strategy holds whole during a pass: those outside of the layers,
        and two layers (one computes while the next is gathered).
        """
        if not self.sharding.gathers_weights:
            return 0
        layers = [
            self.gathered_bytes(weight for weight in self.weights if weight.layer == layer)
            for layer in range(self.shape.layers)
        ]
        outside = self.gathered_bytes(weight for weight in self.weights if weight.layer is None)
        return outside + 2 * max(layers)

    def _reduction_buffers(self) -> int:
        """Communication buffers of gradients."""
        setup = self.setup
        if self.sharding.ddp_buffers:
            return self.vector
        if setup.strategy == "auto":
            return 0
        if setup.strategy == "fsdp2":
            groups = [None, *range(self.shape.layers)]
            sizes = [sum(w.size for w in self.trained if w.layer == group) for group in groups]
            return FLOAT32_BYTES * max(sizes)
        bucket = min(setup.bucket_size, sum(weight.size for weight in self.trained))
        return bucket * setup.trained_bytes
