"""Inputs of a plan: the cost of an objective's training step, and the setup of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from temper.models.folder import LoRASpec, Quantization

# -- cost of an objective

Gradient = Literal["weights", "outputs", "none"]


@dataclass(frozen=True)
class Pass:
    """One kind of forward (and backward) pass over rows of a data stream.

    Attributes:
        stream: Name of the stream; None is the data's primary one.
        times: Number of such passes per optimizer step, on average.
        share: Share of the stream's rows that one pass reads.
        sequences: Sequences per row (2 for preference pairs).
        gradient: Of the trained ``weights``; of block ``outputs`` only; ``none``: forward only.
        vectors: Float32 vectors, each of the size of the trained weights, that are held in memory
            during the pass; the pass's own gradient is not counted.
        displaced: Whether the weights are temporarily displaced, so that a copy of the trained
            weights is kept.
        outputs: Number of blocks whose outputs (``B x T x D``, a device's whole batch) are held
            during the pass; ``all``: one per layer.
        lens: Whether logits are computed from the hidden states of every layer.
    """

    stream: str | None = None
    times: float = 1.0
    share: float = 1.0
    sequences: int = 1
    gradient: Gradient = "weights"
    vectors: int = 0
    displaced: bool = False
    outputs: int | Literal["all"] = 0
    lens: bool = False

    def label(self) -> str:
        """Name of the pass in tables."""
        weights = " at displaced weights" if self.displaced else ""
        kind = {
            "weights": "",
            "outputs": " (gradient of outputs)",
            "none": " (forward only)",
        }[self.gradient]
        return f"{self.stream or 'data'}{weights}{kind}"


@dataclass(frozen=True)
class Cost:
    """Cost of one optimizer step of an objective, at its most expensive.

    Attributes:
        passes: Passes in order.
        vectors: Float32 vectors of the size of the trained weights that are held in the optimizer's
            step, beside the gradient.
        unreduced: Further such vectors where an all-reduce returns a new gradient (DDP).
        copies: Copies of the whole network in memory, such as a frozen reference model.
        reductions: All-reduces of a whole gradient per step, where the objective reduces once
            instead of in each backward pass (DDP).
        trains: Pattern (`re.search`) of the names of trained weights; None: all weights, or the
            adapter's.
        optimizer: Whether there is an optimizer with state.
    """

    passes: tuple[Pass, ...]
    vectors: int = 0
    unreduced: int = 0
    copies: int = 0
    reductions: float = 1.0
    trains: str | None = None
    optimizer: bool = True


# -- setup of a run

FLOAT32_BYTES = 4
DTYPE_BYTES = {"float32": FLOAT32_BYTES, "bfloat16": 2}
# Bytes per quantized weight. nf4: 4 bits, an 8-bit scale per 64 weights and a float32 scale per 256
# of those scales (double quantization).
QUANTIZED_BYTES: dict[Quantization, float] = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


@dataclass(frozen=True)
class Setup:
    """Settings of a run that memory and time depend on.

    Attributes:
        strategy: A key of `temper.plan.memory.STRATEGIES`.
        devices: Number of devices (ranks).
        sequence_length: Tokens per sequence, `T`.
        batch_sizes: Rows per optimizer step over all devices, by stream; None stands for any other
            stream.
        micro_batch_size: Rows per forward pass and device; None: all of the device's rows.
        precision: Lightning's: ``32-true``, ``bf16-mixed`` or ``bf16-true``.
        dtype: Dtype of the weights.
        gather_dtype: Dtype in which FSDP2 gathers weights; None: their own.
        quantization: Quantization of a frozen base model.
        lora: New or loaded LoRA adapter.
        activation_checkpointing: See `NetworkSpec`.
        attention: See `NetworkSpec`.
        fused_loss: See `ObjectiveModule`.
        state_bytes: Bytes of optimizer state per trained weight.
        offload_optimizer: Whether optimizer state and float32 master weights are in host memory.
        offload_parameters: Whether weights are in host memory.
        bucket_size: Elements per communication bucket (DeepSpeed).
        on_cpu: Whether the device is a CPU, where optimizers update one tensor at a time.
    """

    strategy: str
    devices: int
    sequence_length: int
    batch_sizes: Mapping[str | None, int]
    micro_batch_size: int | None = None
    precision: str = "32-true"
    dtype: str = "float32"
    gather_dtype: str | None = None
    quantization: Quantization | None = None
    lora: LoRASpec | None = None
    activation_checkpointing: bool = False
    attention: str | None = None
    fused_loss: bool = False
    state_bytes: float = 8.0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket_size: int = 50_000_000
    on_cpu: bool = False

    @property
    def weight_bytes(self) -> int:
        """Bytes per element of a weight that is not quantized."""
        return 2 if self.precision == "bf16-true" else DTYPE_BYTES[self.dtype]

    @property
    def trained_bytes(self) -> int:
        """Bytes per element of a trained weight.

        Adapters are float32, unless the Trainer converts everything to bfloat16.
        """
        if self.precision == "bf16-true":
            return 2
        return FLOAT32_BYTES if self.lora else DTYPE_BYTES[self.dtype]

    @property
    def activation_bytes(self) -> int:
        """Bytes per element of the inputs and outputs of linear layers."""
        if self.precision.startswith("bf16"):
            return 2
        if self.strategy == "fsdp2" and self.gather_dtype:
            return DTYPE_BYTES[self.gather_dtype]
        return DTYPE_BYTES[self.dtype]

    @property
    def casts_weights(self) -> bool:
        """Whether autocast keeps bfloat16 copies of float32 weights until the backward pass."""
        return self.precision == "bf16-mixed" and self.dtype == "float32" and not self.quantization

    def rows_per_device(self, stream: str | None) -> int:
        """Rows of a stream in an optimizer step on the device that has most of them."""
        return -(-self.batch_sizes.get(stream, self.batch_sizes[None]) // self.devices)
