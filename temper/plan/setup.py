"""What a user asks for, as far as memory and time depend on it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from temper.models.spec import LoRASpec, Quantization

BYTES = {"float32": 4, "bfloat16": 2}
# Bytes of a frozen weight: 4 bits, an 8-bit scale per 64 weights and a float32 one per 256 of those; 8 bits.
FEW_BITS: dict[Quantization, float] = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


@dataclass(frozen=True)
class Setup:
    """Strategy, devices, precision and sizes of a run.

    Attributes:
        strategy: A key of `temper.plan.strategies.STRATEGIES`.
        devices: Ranks in all.
        sequence_length: T, tokens in a row.
        batch_sizes: Rows per optimizer step over all ranks, by stream; the key None stands for any other.
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
        """Of an element of a trained weight: adapters are float32, unless the Trainer converts everything."""
        return 2 if self.precision == "bf16-true" else 4 if self.lora else BYTES[self.dtype]

    @property
    def activation_bytes(self) -> int:
        """Of an element that a linear layer reads or writes."""
        computes = self.gather_dtype if self.strategy == "fsdp2" and self.gather_dtype else self.dtype
        return 2 if self.precision.startswith("bf16") else BYTES[computes]

    @property
    def casts_weights(self) -> bool:
        """Whether autocast keeps bfloat16 copies of float32 weights from the forward to the backward pass."""
        return self.precision == "bf16-mixed" and self.dtype == "float32" and not self.quantization

    def rows(self, stream: str | None) -> int:
        """Rows of a stream that a rank has in an optimizer step; with several ranks the largest share."""
        return -(-self.batch_sizes.get(stream, self.batch_sizes[None]) // self.devices)
