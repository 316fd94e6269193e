"""The plan of a run: memory, communication, FLOPs and time of an optimizer step, and advice."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from temper.plan.advice import RESERVE, ChangeResult, recommend_changes, try_changes, usable_bytes
from temper.plan.cost import FLOAT32_BYTES, Cost, Pass, Setup
from temper.plan.memory import Memory, Phase, replicated
from temper.plan.shapes import ModelShape, adapted_linears

# -- communication


@dataclass(frozen=True)
class Communication:
    """Communication of one device in an optimizer step.

    Attributes:
        reductions: Reductions of a whole gradient.
        gathers: Gathers of all weights; where weights are not sharded, of the trained weights.
        bytes: Bytes sent, without scalars.
    """

    reductions: float
    gathers: float
    bytes: float


def estimate_communication(memory: Memory) -> Communication:
    """Estimate the communication of a step with ring algorithms.

    To reduce-scatter or all-gather M bytes over n devices, each device sends ``M (n - 1) / n``; an
    all-reduce sends twice that.
    """
    setup = memory.setup
    cost = memory.cost
    if setup.devices == 1:
        return Communication(0.0, 0.0, 0.0)
    ring = (setup.devices - 1) / setup.devices
    trained = sum(weight.size for weight in memory.trained)
    if not memory.sharding.reduces_every_pass:
        sent = cost.reductions * 2 * ring * FLOAT32_BYTES * trained
        return Communication(cost.reductions, 0.0, sent)
    runs = [(each, each.times * _micro_batches(memory, each)) for each in cost.passes]
    reductions = sum(times for each, times in runs if each.gradient == "weights")
    element = FLOAT32_BYTES if setup.strategy == "fsdp2" else setup.trained_bytes
    reduced = reductions * ring * element * trained
    if memory.sharding.gathers_weights:  # in every forward and every backward pass
        gathers = sum(times * (1 if each.gradient == "none" else 2) for each, times in runs)
        size = memory.gathered_bytes((*memory.trained, *memory.frozen))
    else:  # after the optimizer's step, and before and after each pass at displaced weights
        gathers = 1 + sum(2 * each.times for each in cost.passes if each.displaced)
        size = memory.bytes_of(memory.trained, replicated)
    return Communication(reductions, gathers, reduced + gathers * ring * size)


def _micro_batches(memory: Memory, each: Pass) -> int:
    per_step, per_micro_batch = memory.rows(each)
    return -(-per_step // per_micro_batch)


# -- FLOPs and time


@dataclass(frozen=True)
class Work:
    """Computation of one optimizer step over all devices; padding counts as tokens.

    Attributes:
        passes: Passes over a batch: forward and backward, or forward only.
        tokens: Tokens of all passes.
        flops: Floating-point operations. 2 per weight and token in the forward pass, and as many
            for gradients of inputs and for gradients of trained weights; with activation
            checkpointing one forward pass more; causal attention ``2 T`` per channel and token.
    """

    passes: float
    tokens: float
    flops: float

    def seconds(self, devices: int, tflops: float, mfu: float) -> float:
        """Seconds at ``tflops`` TFLOP/s per device and a model FLOPs utilisation ``mfu``, with
        communication overlapped.
        """
        return self.flops / (devices * tflops * 1e12 * mfu)


def estimate_work(memory: Memory) -> Work:
    """Estimate the computation of a step."""
    tokens = 0.0
    flops = 0.0
    for each in memory.cost.passes:
        rows, _ = memory.rows(each)
        per_device = each.times * rows * each.sequences * memory.setup.sequence_length
        tokens += per_device * memory.setup.devices
        flops += per_device * memory.setup.devices * flops_per_token(memory, each)
    return Work(sum(each.times for each in memory.cost.passes), tokens, flops)


def flops_per_token(memory: Memory, each: Pass) -> float:
    """Floating-point operations of a pass per token."""
    shape = memory.shape
    setup = memory.setup
    layers = 2.0 * sum(x.inputs * x.outputs for x in shape.linears if x.place != "head")
    channels = sum(x.inputs for x in shape.linears if x.place == "attention_out")
    attention = 2.0 * setup.sequence_length * channels
    head = 2.0 * sum(x.inputs * x.outputs for x in shape.linears if x.place == "head")
    if each.lens:
        head *= shape.layers + 1
    adapters = 0.0
    if setup.lora:  # A (inputs x rank) and B (rank x outputs)
        targets = adapted_linears(shape, setup.lora)
        adapters = 2.0 * sum(setup.lora.rank * (x.inputs + x.outputs) for x in targets)
    forward = layers + attention + head + adapters
    if each.gradient == "none":
        return forward
    backward = layers + 2 * attention + head + adapters
    if each.gradient == "weights":
        trained = {weight.name for weight in memory.trained}
        backward += adapters + sum(
            2.0 * x.inputs * x.outputs for x in shape.linears if f"{x.name}.weight" in trained
        )
    recomputed = layers + attention + adapters if setup.activation_checkpointing else 0.0
    return forward + backward + recomputed + (head if setup.fused_loss else 0.0)


# -- plan


@dataclass(frozen=True)
class Device:
    """A device.

    Attributes:
        gib: Memory in GiB.
        tflops: Peak rate in TFLOP/s (dense, in the precision of the run).
        mfu: Model FLOPs utilisation: share of the peak rate that the run reaches.
    """

    gib: float
    tflops: float
    mfu: float


@dataclass(frozen=True)
class Plan:
    """Plan of a run. Sizes are bytes on the device with the largest shards.

    Attributes:
        objective: Class name of the objective.
        shape: Class and size of the network.
        source: Where the network's shape came from.
        setup: Settings of the run.
        parameters: Weights of the network, including its adapter.
        trainable: Number of those that are trained.
        phases: Memory by component at every phase that may be the peak.
        host: Bytes in host memory, per device.
        choices: Peak with activation checkpointing, and with the fused loss, off and on; None where
            that is impossible.
        communication: Communication of a device in a step.
        work: Tokens and FLOPs of a step.
        device: The device that the run is planned for.
        seconds: Seconds of a step.
        changes: Recommended changes, if it does not fit: see `recommend_changes`.
        tried: Effect of every change on its own, if it does not fit.
    """

    objective: str
    shape: str
    source: str
    setup: Setup
    parameters: int
    trainable: int
    phases: list[Phase]
    host: int
    choices: dict[str, dict[bool, int | None]]
    communication: Communication
    work: Work
    device: Device
    seconds: float
    changes: list[ChangeResult]
    tried: list[ChangeResult]

    @property
    def peak(self) -> Phase:
        """The phase that needs the most memory."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the reserve of a device free."""
        return self.peak.total <= usable_bytes(self.device.gib)

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values; sizes in bytes."""
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
                "phases": {
                    phase.name: phase.components | {"total": phase.total} for phase in self.phases
                },
                "host": self.host,
                "choices": {
                    name: {str(on).lower(): peak for on, peak in peaks.items()}
                    for name, peaks in self.choices.items()
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
    """Plan a run; takes milliseconds.

    Args:
        objective: Class name of the objective.
        shape: Shape of the network.
        setup: Settings of the run.
        cost: Cost of the objective's step.
        device: The device that the run is planned for.
    """
    memory = Memory(shape, setup, cost)
    work = estimate_work(memory)
    changes = recommend_changes(shape, setup, cost, device.gib)
    return Plan(
        objective=objective,
        shape=shape.name,
        source=shape.source,
        setup=setup,
        parameters=sum(weight.size for weight in memory.weights),
        trainable=sum(weight.size for weight in memory.trained),
        phases=memory.phases,
        host=memory.host,
        choices=_peaks_by_choice(shape, setup, cost),
        communication=estimate_communication(memory),
        work=work,
        device=device,
        seconds=work.seconds(setup.devices, device.tflops, device.mfu),
        changes=changes,
        tried=try_changes(shape, setup, cost, device.gib) if changes else [],
    )


def _peaks_by_choice(
    shape: ModelShape, setup: Setup, cost: Cost
) -> dict[str, dict[bool, int | None]]:
    """Peak with activation checkpointing off and on, and with the fused loss off and on."""

    def peak(changed: Setup) -> int:
        return Memory(shape, changed, cost).peak.total

    return {
        "activation_checkpointing": {
            on: peak(replace(setup, activation_checkpointing=on)) for on in (False, True)
        },
        "fused_loss": {
            False: peak(replace(setup, fused_loss=False)),
            True: None if shape.capped else peak(replace(setup, fused_loss=True)),
        },
    }
