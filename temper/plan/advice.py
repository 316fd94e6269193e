"""What to change if a run does not fit: every change is tried in the plan itself."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from temper.models.spec import LoRASpec
from temper.plan.cost import Cost
from temper.plan.memory import Memory
from temper.plan.setup import Setup
from temper.plan.shapes import ModelShape

RESERVE = 0.08  # of a device: CUDA's own memory, and what the allocator cannot use
GIB = 2**30
NETWORK = "model.init_args.network"
MICRO = "model.init_args.micro_batch_size={setup.micro_batch_size}"


@dataclass(frozen=True)
class Change:
    """One change.

    Attributes:
        words: What to set.
        keeps: Whether the result of training stays what it is.
        make: The changed setup; None where it does not apply.
    """

    words: str
    keeps: bool
    make: Callable[[Setup, ModelShape], Setup | None]


@dataclass(frozen=True)
class Tried:
    """A change, with the memory that it leaves (bytes, on one device) and whether that fits."""

    words: str
    keeps: bool
    peak: int
    fits: bool


def room(device_gib: float) -> float:
    """Bytes of a device that a plan may use."""
    return device_gib * GIB * (1 - RESERVE)


def _micro_batch(divisor: int | None) -> Callable[[Setup, ModelShape], Setup | None]:
    """Micro-batches that are a part of what they are; None: single rows."""

    def change(setup: Setup, shape: ModelShape) -> Setup | None:
        rows = max(setup.rows(stream) for stream in setup.batch_sizes)
        now = min(setup.micro_batch_size or rows, rows)
        size = 1 if divisor is None else now // divisor
        return replace(setup, micro_batch_size=size) if now > size >= (1 if divisor is None else 2) else None

    return change


def _to(strategy: str, **more: bool) -> Callable[[Setup, ModelShape], Setup | None]:
    def change(setup: Setup, shape: ModelShape) -> Setup | None:
        # Weights in few bits are not cut into parts.
        if (setup.strategy == strategy and not more) or setup.devices == 1 or setup.quantization:
            return None
        return replace(setup, strategy=strategy, **more)  # type: ignore[arg-type]

    return change


def _eight_bits(setup: Setup, shape: ModelShape) -> Setup | None:
    plain = setup.lora is None and setup.state_bytes == 8 and setup.strategy in ("auto", "ddp")
    return replace(setup, state_bytes=2.0) if plain else None


def _nf4(setup: Setup, shape: ModelShape) -> Setup | None:
    return replace(setup, quantization="nf4") if setup.lora and not setup.quantization and setup.strategy in ("auto", "ddp") else None


CHANGES: tuple[Change, ...] = (
    Change(
        f"{NETWORK}.activation_checkpointing=true", True,
        lambda setup, shape: None if setup.activation_checkpointing else replace(setup, activation_checkpointing=True),
    ),
    Change(MICRO, True, _micro_batch(2)),
    Change(MICRO, True, _micro_batch(4)),
    Change(MICRO, True, _micro_batch(8)),
    Change(MICRO, True, _micro_batch(None)),
    Change(
        "model.init_args.fused_loss=true", True,
        lambda setup, shape: None if setup.fused_loss or shape.capped else replace(setup, fused_loss=True),
    ),
    Change("trainer.strategy=fsdp2", True, _to("fsdp2")),
    Change(
        f"{NETWORK}.dtype=bfloat16, with the adapter in float32", False,
        lambda setup, shape: replace(setup, dtype="bfloat16") if setup.lora and setup.dtype == "float32" else None,
    ),
    Change("configs/optimizer/adamw8bit.yaml", False, _eight_bits),
    Change(
        f"{NETWORK}.lora, rank 16, on a bfloat16 base", False,
        lambda setup, shape: None if setup.lora else replace(setup, lora=LoRASpec(targets="all-linear"), dtype="bfloat16"),
    ),
    Change(f"{NETWORK}.quantization=nf4", False, _nf4),
    Change(
        "twice the devices, trainer.strategy=fsdp2", True,
        lambda setup, shape: None if setup.quantization else replace(setup, strategy="fsdp2", devices=2 * setup.devices),
    ),
    Change(
        "ZeROStrategy, stage 3, with offload_optimizer and offload_parameters", True,
        _to("zero3", offload_optimizer=True, offload_parameters=True),
    ),
    Change(
        "eight times the devices, trainer.strategy=fsdp2", True,
        lambda setup, shape: None if setup.quantization else replace(setup, strategy="fsdp2", devices=8 * setup.devices),
    ),
)  # fmt: skip


def try_changes(shape: ModelShape, setup: Setup, cost: Cost, device_gib: float) -> list[Tried]:
    """Every change on its own, in the order in which they should be considered: those that change no result first."""
    found = []
    for change in CHANGES:
        changed = change.make(setup, shape)
        if changed is not None:
            peak = Memory(shape, changed, cost).peak.total
            found.append(Tried(change.words.format(setup=changed), change.keeps, peak, peak <= room(device_gib)))
    return found


def first_changes(shape: ModelShape, setup: Setup, cost: Cost, device_gib: float) -> list[Tried]:
    """The first change that makes it fit; else changes one upon another until it does, each of which helps.

    Returns:
        Empty if it fits as it is. If the last one does not fit, nothing here makes it fit.
    """
    peak = Memory(shape, setup, cost).peak.total
    if peak <= room(device_gib):
        return []
    for tried in try_changes(shape, setup, cost, device_gib):
        if tried.fits:
            return [tried]
    path: list[Tried] = []
    for change in CHANGES:
        changed = change.make(setup, shape)
        if changed is None:
            continue
        after = Memory(shape, changed, cost).peak.total
        if after < 0.98 * peak:
            setup, peak = changed, after
            path.append(Tried(change.words.format(setup=changed), change.keeps, peak, peak <= room(device_gib)))
            if path[-1].fits:
                break
    return path
