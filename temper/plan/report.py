"""Everything that a plan says, in one object that becomes a table or JSON."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from temper.models.folder import LoRASpec
from temper.plan.cost import Cost, Pass, Setup
from temper.plan.memory import VECTOR, Memory, Moment, whole
from temper.plan.shapes import ModelShape, adapted

# MERGED from temper.plan.report: What devices send each other in an optimizer step. |  | Ring
# algorithms: to reduce or to gather M bytes over n devices, each sends ``M (n - 1) / n``; to reduce
# for all, twice that.


@dataclass(frozen=True)
class Communication:
    """Of one device and optimizer step.

    Attributes:
        reductions: Times that a whole gradient is reduced.
        gathers: Times that all weights (or, where they are whole on every device, the trained ones)
            are gathered.
        bytes: Bytes sent, small sums not counted.
    """

    reductions: float
    gathers: float
    bytes: float


def communication(memory: Memory) -> Communication:
    """Communication of a step."""
    setup, cost, sharding = memory.setup, memory.cost, memory.sharding
    if setup.devices == 1:
        return Communication(0.0, 0.0, 0.0)
    way = (setup.devices - 1) / setup.devices
    trained = sum(weight.size for weight in memory.trained)
    if not sharding.in_passes:
        return Communication(cost.reductions, 0.0, cost.reductions * 2 * way * VECTOR * trained)
    runs = [(each, each.times * _micro_batches(memory, each)) for each in cost.passes]
    reductions = sum(times for each, times in runs if each.gradient == "weights")
    element = VECTOR if setup.strategy == "fsdp2" else setup.trained_bytes
    reduced = reductions * way * element * trained
    if sharding.gathers:
        gathers = sum(times * (1 if each.gradient == "none" else 2) for each, times in runs)
        size = memory.whole((*memory.trained, *memory.frozen))
    else:  # after every displacement, after its end, and after the optimizer's step
        gathers = 1 + sum(2 * each.times for each in cost.passes if each.displaced)
        size = memory.bytes_of(memory.trained, whole)
    return Communication(reductions, gathers, reduced + gathers * way * size)


def _micro_batches(memory: Memory, each: Pass) -> int:
    mine, micro = memory.rows(each)
    return -(-mine // micro)


# MERGED from temper.plan.report: Tokens, floating-point operations and time of an optimizer step.


@dataclass(frozen=True)
class Work:
    """Of one optimizer step, over all devices; every token of a row is counted, padding too.

    Attributes:
        passes: Forward and backward passes over a batch, and forward passes alone.
        tokens: Tokens of all passes.
        flops: Floating-point operations: 2 per weight and token in a product, forward; the same for
            gradients of inputs, and of weights that learn; one forward pass more with activation
            checkpointing; causal attention ``2 T`` per channel.
    """

    passes: float
    tokens: float
    flops: float

    def seconds(self, devices: int, tflops: float, mfu: float) -> float:
        """Time at a rate: ``tflops`` per device, of which the share ``mfu`` is reached.
        Communication is taken to be hidden.
        """
        return self.flops / (devices * tflops * 1e12 * mfu)


def work(memory: Memory) -> Work:
    """Work of a step."""
    cost = memory.cost
    tokens = [
        each.times * memory.rows(each)[0] * each.sequences * memory.setup.sequence_length
        for each in cost.passes
    ]
    everywhere = [n * memory.setup.devices for n in tokens]
    flops = sum(
        n * flops_per_token(memory, each) for n, each in zip(everywhere, cost.passes, strict=True)
    )
    return Work(sum(each.times for each in cost.passes), sum(everywhere), flops)


def flops_per_token(memory: Memory, each: Pass) -> float:
    """Operations of a pass per token."""
    shape, setup = memory.shape, memory.setup
    layers = 2.0 * sum(x.inputs * x.outputs for x in shape.linears if x.place != "head")
    attention = (
        2.0
        * setup.sequence_length
        * sum(x.inputs for x in shape.linears if x.place == "attention_out")
    )
    head = (
        2.0
        * sum(x.inputs * x.outputs for x in shape.linears if x.place == "head")
        * (shape.layers + 1 if each.lens else 1)
    )
    # A and B are two more products, of inputs x rank and rank x outputs.
    adapters = (
        2.0 * sum(setup.lora.rank * (x.inputs + x.outputs) for x in adapted(shape, setup.lora))
        if setup.lora
        else 0.0
    )
    forward = layers + attention + head + adapters
    if each.gradient == "none":
        return forward
    backward = layers + 2 * attention + head + adapters
    if each.gradient == "weights":
        trained = {weight.name for weight in memory.trained}
        backward += adapters + sum(
            2.0 * x.inputs * x.outputs for x in shape.linears if f"{x.name}.weight" in trained
        )
    again = layers + attention + adapters if setup.activation_checkpointing else 0.0
    return forward + backward + again + (head if setup.fused_loss else 0.0)


# MERGED from temper.plan.report: What to change if a run does not fit: every change is tried in the
# plan itself.


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
        return (
            replace(setup, micro_batch_size=size)
            if now > size >= (1 if divisor is None else 2)
            else None
        )

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
    return (
        replace(setup, quantization="nf4")
        if setup.lora and not setup.quantization and setup.strategy in ("auto", "ddp")
        else None
    )


CHANGES: tuple[Change, ...] = (
    Change(
        f"{NETWORK}.activation_checkpointing=true",
        True,
        lambda setup, shape: (
            None
            if setup.activation_checkpointing
            else replace(setup, activation_checkpointing=True)
        ),
    ),
    Change(MICRO, True, _micro_batch(2)),
    Change(MICRO, True, _micro_batch(4)),
    Change(MICRO, True, _micro_batch(8)),
    Change(MICRO, True, _micro_batch(None)),
    Change(
        "model.init_args.fused_loss=true",
        True,
        lambda setup, shape: (
            None if setup.fused_loss or shape.capped else replace(setup, fused_loss=True)
        ),
    ),
    Change("trainer.strategy=fsdp2", True, _to("fsdp2")),
    Change(
        f"{NETWORK}.dtype=bfloat16, with the adapter in float32",
        False,
        lambda setup, shape: (
            replace(setup, dtype="bfloat16") if setup.lora and setup.dtype == "float32" else None
        ),
    ),
    Change("configs/optimizer/adamw8bit.yaml", False, _eight_bits),
    Change(
        f"{NETWORK}.lora, rank 16, on a bfloat16 base",
        False,
        lambda setup, shape: (
            None
            if setup.lora
            else replace(setup, lora=LoRASpec(targets="all-linear"), dtype="bfloat16")
        ),
    ),
    Change(f"{NETWORK}.quantization=nf4", False, _nf4),
    Change(
        "twice the devices, trainer.strategy=fsdp2",
        True,
        lambda setup, shape: (
            None
            if setup.quantization
            else replace(setup, strategy="fsdp2", devices=2 * setup.devices)
        ),
    ),
    Change(
        "ZeROStrategy, stage 3, with offload_optimizer and offload_parameters",
        True,
        _to("zero3", offload_optimizer=True, offload_parameters=True),
    ),
    Change(
        "eight times the devices, trainer.strategy=fsdp2",
        True,
        lambda setup, shape: (
            None
            if setup.quantization
            else replace(setup, strategy="fsdp2", devices=8 * setup.devices)
        ),
    ),
)


def try_changes(shape: ModelShape, setup: Setup, cost: Cost, device_gib: float) -> list[Tried]:
    """Every change on its own, in the order in which they should be considered: those that change
    no result first.
    """
    found = []
    for change in CHANGES:
        changed = change.make(setup, shape)
        if changed is not None:
            peak = Memory(shape, changed, cost).peak.total
            found.append(
                Tried(
                    change.words.format(setup=changed), change.keeps, peak, peak <= room(device_gib)
                )
            )
    return found


def first_changes(shape: ModelShape, setup: Setup, cost: Cost, device_gib: float) -> list[Tried]:
    """The first change that makes it fit; else changes one upon another until it does, each of
    which helps.

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
            path.append(
                Tried(
                    change.words.format(setup=changed), change.keeps, peak, peak <= room(device_gib)
                )
            )
            if path[-1].fits:
                break
    return path


@dataclass(frozen=True)
class Device:
    """A device: its memory, and the rate at which it computes (dense, in the precision of the
    run).
    """

    gib: float
    tflops: float
    mfu: float


@dataclass(frozen=True)
class Plan:
    """A run as it would be. Sizes are bytes on the device that has most; time is of one optimizer
    step.

    Attributes:
        objective: Class name.
        shape: The network's class and size.
        source: Where the shape came from.
        setup: What was asked for.
        parameters: Weights of the network, its adapter included.
        trainable: Those that learn.
        moments: Memory by part at every moment that may be the fullest.
        host: Bytes in the host's memory, per device.
        choices: Peak if activation checkpointing, or the fused loss, were set otherwise; None where
            that cannot be.
        communication: What devices send each other.
        work: Tokens and operations.
        device: What it is held against.
        seconds: Of an optimizer step.
        changes: What to change, if it does not fit: see `first_changes`.
        tried: Every change on its own, if it does not fit.
    """

    objective: str
    shape: str
    source: str
    setup: Setup
    parameters: int
    trainable: int
    moments: list[Moment]
    host: int
    choices: dict[str, dict[bool, int | None]]
    communication: Communication
    work: Work
    device: Device
    seconds: float
    changes: list[Tried]
    tried: list[Tried]

    @property
    def peak(self) -> Moment:
        """The fullest moment."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the reserve of a device free."""
        return self.peak.total <= room(self.device.gib)

    def as_json(self) -> dict[str, Any]:
        """Plain values; sizes in bytes."""
        setup = asdict(self.setup)
        setup["batch_sizes"] = {
            str(stream or "any"): rows for stream, rows in self.setup.batch_sizes.items()
        }
        return {
            "objective": self.objective,
            "shape": self.shape,
            "source": self.source,
            "setup": setup,
            "parameters": self.parameters,
            "trainable": self.trainable,
            "memory": {
                "peak": self.peak.total,
                "peak_at": self.peak.name,
                "moments": {
                    moment.name: moment.parts | {"total": moment.total} for moment in self.moments
                },
                "host": self.host,
                "choices": {
                    name: {str(on).lower(): value for on, value in found.items()}
                    for name, found in self.choices.items()
                },
            },
            "communication": asdict(self.communication),
            "tokens_per_step": self.work.tokens,
            "passes_per_step": self.work.passes,
            "flops_per_step": self.work.flops,
            "seconds_per_step": self.seconds,
            "device": asdict(self.device) | {"reserve": RESERVE},
            "fits": self.fits,
            "changes": [asdict(change) for change in self.changes],
            "tried": [asdict(change) for change in self.tried],
        }


def make_plan(objective: str, shape: ModelShape, setup: Setup, cost: Cost, device: Device) -> Plan:
    """Work everything out; milliseconds."""
    memory = Memory(shape, setup, cost)
    done = work(memory)
    changes = first_changes(shape, setup, cost, device.gib)
    every = (*memory.trained, *memory.frozen)
    return Plan(
        objective=objective,
        shape=shape.name,
        source=shape.source,
        setup=setup,
        parameters=sum(weight.size for weight in every),
        trainable=sum(weight.size for weight in memory.trained),
        moments=memory.moments,
        host=memory.host,
        choices=_choices(shape, setup, cost),
        communication=communication(memory),
        work=done,
        device=device,
        seconds=done.seconds(setup.devices, device.tflops, device.mfu),
        changes=changes,
        tried=try_changes(shape, setup, cost, device.gib) if changes else [],
    )


def _choices(shape: ModelShape, setup: Setup, cost: Cost) -> dict[str, dict[bool, int | None]]:
    found: dict[str, dict[bool, int | None]] = {}
    for name in ("activation_checkpointing", "fused_loss"):
        found[name] = {}
        for on in (False, True):
            changed: Setup = replace(setup, **{name: on})  # type: ignore[arg-type]
            impossible = name == "fused_loss" and on and shape.capped
            found[name][on] = None if impossible else Memory(shape, changed, cost).peak.total
    return found


def gib(size: float) -> float:
    """Bytes in GiB."""
    return size / GIB
