"""Changes of settings that make a run fit; each one is tried by planning the changed run."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from temper.models.folder import LoRASpec
from temper.plan.cost import Cost, Setup
from temper.plan.memory import Memory
from temper.plan.shapes import ModelShape

GIB = 2**30
RESERVE = 0.08  # share of a device for CUDA's context and the allocator's fragmentation
NETWORK = "model.init_args.network"
MICRO_BATCH = "model.init_args.micro_batch_size={setup.micro_batch_size}"

# Returns the changed setup, or None where the change does not apply.
ApplyChange = Callable[[Setup, ModelShape], Setup | None]


def usable_bytes(device_gib: float) -> float:
    """Bytes of a device that a run may use: all but the reserve."""
    return device_gib * GIB * (1 - RESERVE)


@dataclass(frozen=True)
class Change:
    """A change of settings.

    Attributes:
        setting: What to set; ``{setup.NAME}`` stands for a value of the changed setup.
        same_result: Whether training gives the same result.
        apply: Returns the changed setup; None where the change does not apply.
    """

    setting: str
    same_result: bool
    apply: ApplyChange


@dataclass(frozen=True)
class ChangeResult:
    """A change and its effect.

    Attributes:
        setting: What to set.
        same_result: Whether training gives the same result.
        peak: Peak memory of a device with the change, in bytes.
        fits: Whether the run fits with the change.
    """

    setting: str
    same_result: bool
    peak: int
    fits: bool


# -- known changes


def _checkpoint_activations(setup: Setup, shape: ModelShape) -> Setup | None:
    if setup.activation_checkpointing:
        return None
    return replace(setup, activation_checkpointing=True)


def _divide_micro_batch(divisor: int) -> ApplyChange:
    def apply(setup: Setup, shape: ModelShape) -> Setup | None:
        size = _micro_batch_size(setup) // divisor
        return replace(setup, micro_batch_size=size) if size >= 2 else None

    return apply


def _single_rows(setup: Setup, shape: ModelShape) -> Setup | None:
    return replace(setup, micro_batch_size=1) if _micro_batch_size(setup) > 1 else None


def _micro_batch_size(setup: Setup) -> int:
    rows = max(setup.rows_per_device(stream) for stream in setup.batch_sizes)
    return min(setup.micro_batch_size or rows, rows)


def _fuse_loss(setup: Setup, shape: ModelShape) -> Setup | None:
    if setup.fused_loss or shape.capped:
        return None
    return replace(setup, fused_loss=True)


def _use_fsdp2(setup: Setup, shape: ModelShape) -> Setup | None:
    # Quantized weights cannot be sharded.
    if setup.strategy == "fsdp2" or setup.devices == 1 or setup.quantization:
        return None
    return replace(setup, strategy="fsdp2")


def _use_zero3_offload(setup: Setup, shape: ModelShape) -> Setup | None:
    if setup.devices == 1 or setup.quantization:
        return None
    return replace(setup, strategy="zero3", offload_optimizer=True, offload_parameters=True)


def _multiply_devices(factor: int) -> ApplyChange:
    def apply(setup: Setup, shape: ModelShape) -> Setup | None:
        if setup.quantization:
            return None
        return replace(setup, strategy="fsdp2", devices=factor * setup.devices)

    return apply


def _use_bfloat16_base(setup: Setup, shape: ModelShape) -> Setup | None:
    if setup.lora and setup.dtype == "float32":
        return replace(setup, dtype="bfloat16")
    return None


def _use_8bit_optimizer(setup: Setup, shape: ModelShape) -> Setup | None:
    if setup.lora is None and setup.state_bytes == 8 and setup.strategy in ("auto", "ddp"):
        return replace(setup, state_bytes=2.0)
    return None


def _add_lora(setup: Setup, shape: ModelShape) -> Setup | None:
    if setup.lora:
        return None
    return replace(setup, lora=LoRASpec(targets="all-linear"), dtype="bfloat16")


def _quantize_nf4(setup: Setup, shape: ModelShape) -> Setup | None:
    if setup.lora and not setup.quantization and setup.strategy in ("auto", "ddp"):
        return replace(setup, quantization="nf4")
    return None


# In the order in which they should be considered.
CHANGES: tuple[Change, ...] = (
    Change(f"{NETWORK}.activation_checkpointing=true", True, _checkpoint_activations),
    Change(MICRO_BATCH, True, _divide_micro_batch(2)),
    Change(MICRO_BATCH, True, _divide_micro_batch(4)),
    Change(MICRO_BATCH, True, _divide_micro_batch(8)),
    Change(MICRO_BATCH, True, _single_rows),
    Change("model.init_args.fused_loss=true", True, _fuse_loss),
    Change("trainer.strategy=fsdp2", True, _use_fsdp2),
    Change(f"{NETWORK}.dtype=bfloat16, with the adapter in float32", False, _use_bfloat16_base),
    Change("configs/optimizer/adamw8bit.yaml", False, _use_8bit_optimizer),
    Change(f"{NETWORK}.lora, rank 16, on a bfloat16 base", False, _add_lora),
    Change(f"{NETWORK}.quantization=nf4", False, _quantize_nf4),
    Change("twice the devices, trainer.strategy=fsdp2", True, _multiply_devices(2)),
    Change(
        "ZeROStrategy, stage 3, with offload_optimizer and offload_parameters",
        True,
        _use_zero3_offload,
    ),
    Change("eight times the devices, trainer.strategy=fsdp2", True, _multiply_devices(8)),
)


# -- search


def try_changes(
    shape: ModelShape, setup: Setup, cost: Cost, device_gib: float
) -> list[ChangeResult]:
    """Effect of every change that applies, each on its own, in the order of `CHANGES`."""
    results = []
    for change in CHANGES:
        changed = change.apply(setup, shape)
        if changed is not None:
            results.append(_result(change, shape, changed, cost, device_gib))
    return results


def recommend_changes(
    shape: ModelShape, setup: Setup, cost: Cost, device_gib: float
) -> list[ChangeResult]:
    """The first single change that makes the run fit; if there is none, changes one after the
    other, each of which lowers the peak by more than 2 %, until it fits.

    Returns:
        Empty if the run fits. If the last result does not fit, no known changes make it fit.
    """
    peak = Memory(shape, setup, cost).peak.total
    if peak <= usable_bytes(device_gib):
        return []
    for result in try_changes(shape, setup, cost, device_gib):
        if result.fits:
            return [result]
    applied: list[ChangeResult] = []
    for change in CHANGES:
        changed = change.apply(setup, shape)
        if changed is None:
            continue
        result = _result(change, shape, changed, cost, device_gib)
        if result.peak < 0.98 * peak:
            setup = changed
            peak = result.peak
            applied.append(result)
            if result.fits:
                break
    return applied


def _result(
    change: Change, shape: ModelShape, changed: Setup, cost: Cost, device_gib: float
) -> ChangeResult:
    peak = Memory(shape, changed, cost).peak.total
    return ChangeResult(
        setting=change.setting.format(setup=changed),
        same_result=change.same_result,
        peak=peak,
        fits=peak <= usable_bytes(device_gib),
    )
