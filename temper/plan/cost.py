"""What an objective says about its training step: passes over the data, and what is held
meanwhile.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from temper.models.folder import LoRASpec, Quantization

Gradient = Literal["weights", "outputs", "none"]


@dataclass(frozen=True)
class Pass:
    """One kind of pass over rows of a stream.

    Attributes:
        stream: Name of the stream; None is the data's primary one.
        times: How often it happens in an optimizer step, on average.
        share: Share of the stream's rows that one of them reads.
        sequences: Sequences of a row that go through the network (2 for pairs).
        gradient: Of the ``weights``; of block ``outputs`` alone; or ``none``, a forward pass only.
        vectors: Vectors (float32, the size of the trained weights) that are held meanwhile, the
            pass's own gradient not counted.
        displaced: The trained weights are away from where they belong, and a copy of them is kept.
        outputs: Blocks whose outputs (``B x T x D`` of a rank's whole batch) are held for the pass,
            or ``all``: one per layer.
        lens: Logits are computed from every hidden state, not from the last alone.
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

    def name(self, primary: str = "data") -> str:
        """Words for a table."""
        kind = {"weights": "", "outputs": " (gradient of outputs)", "none": " (forward only)"}[
            self.gradient
        ]
        return f"{self.stream or primary}{' at displaced weights' if self.displaced else ''}{kind}"


@dataclass(frozen=True)
class Cost:
    """One optimizer step of an objective, where it needs the most memory.

    Attributes:
        passes: In the order in which they happen.
        vectors: Vectors that are alive at the optimizer's step beside the gradient that it reads.
        unreduced: More of them where reducing a gradient over ranks makes a new one (DDP).
        copies: Copies of the whole network that stay in memory: a frozen reference.
        reductions: Reductions of a whole gradient per step, where passes do not reduce by
            themselves (DDP).
        trains: Pattern (`re.search`) of the names of the weights that are trained; None: all, or
            the adapter.
        optimizer: Whether there is an optimizer with a state.
    """

    passes: tuple[Pass, ...]
    vectors: int = 0
    unreduced: int = 0
    copies: int = 0
    reductions: float = 1.0
    trains: str | None = None
    optimizer: bool = True


# MERGED from temper.plan.cost: What a user asks for, as far as memory and time depend on it.


BYTES = {"float32": 4, "bfloat16": 2}
# Bytes of a frozen weight: 4 bits, an 8-bit scale per 64 weights and a float32 one per 256 of
# those; 8 bits.
FEW_BITS: dict[Quantization, float] = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


@dataclass(frozen=True)
class Setup:
    """Strategy, devices, precision and sizes of a run.

    Attributes:
        strategy: A key of `temper.plan.memory.STRATEGIES`.
        devices: Ranks in all.
        sequence_length: T, tokens in a row.
        batch_sizes: Rows per optimizer step over all ranks, by stream; the key None stands for any
            other.
        micro_batch_size: Rows per forward pass and rank; None: all of a rank's.
        precision: Lightning's: ``32-true``, ``bf16-mixed`` or ``bf16-true``.
        dtype: Of the weights.
        gather_dtype: Of weights that FSDP2 gathers; None: as they are.
        quantization: Of a frozen base.
        lora: A new adapter, or the one that is found.
        activation_checkpointing: See `NetworkSpec`.
        attention: See `NetworkSpec`.
        fused_loss: See `ObjectiveModule`.
        state_bytes: Optimizer state per trained weight.
        offload_optimizer: State, and exact weights, in the host's memory.
        offload_parameters: Weights there too.
        bucket_size: Elements that DeepSpeed sends together.
        on_cpu: There, optimizers go through weights one by one.
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
    on_cpu: bool = field(default=False)

    @property
    def weight_bytes(self) -> int:
        """Of an element of a weight that is not quantised."""
        return 2 if self.precision == "bf16-true" else BYTES[self.dtype]

    @property
    def trained_bytes(self) -> int:
        """Of an element of a trained weight: adapters are float32, unless the Trainer converts
        everything.
        """
        return 2 if self.precision == "bf16-true" else 4 if self.lora else BYTES[self.dtype]

    @property
    def activation_bytes(self) -> int:
        """Of an element that a linear layer reads or writes."""
        computes = (
            self.gather_dtype if self.strategy == "fsdp2" and self.gather_dtype else self.dtype
        )
        return 2 if self.precision.startswith("bf16") else BYTES[computes]

    @property
    def casts_weights(self) -> bool:
        """Whether autocast keeps bfloat16 copies of float32 weights from the forward to the
        backward pass.
        """
        return self.precision == "bf16-mixed" and self.dtype == "float32" and not self.quantization

    def rows(self, stream: str | None) -> int:
        """Rows of a stream that a rank has in an optimizer step; with several ranks the largest
        share.
        """
        return -(-self.batch_sizes.get(stream, self.batch_sizes[None]) // self.devices)
