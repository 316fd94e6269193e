"""Everything that a plan says, in one object that becomes a table or JSON."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from temper.plan.advice import GIB, RESERVE, Tried, first_changes, room, try_changes
from temper.plan.communication import Communication, communication
from temper.plan.cost import Cost
from temper.plan.memory import Memory, Moment
from temper.plan.setup import Setup
from temper.plan.shapes import ModelShape
from temper.plan.work import Work, work


@dataclass(frozen=True)
class Device:
    """A device: its memory, and the rate at which it computes (dense, in the precision of the run)."""

    gib: float
    tflops: float
    mfu: float


@dataclass(frozen=True)
class Plan:
    """A run as it would be. Sizes are bytes on the device that has most; time is of one optimizer step.

    Attributes:
        objective: Class name.
        shape: The network's class and size.
        source: Where the shape came from.
        setup: What was asked for.
        parameters: Weights of the network, its adapter included.
        trainable: Those that learn.
        moments: Memory by part at every moment that may be the fullest.
        host: Bytes in the host's memory, per device.
        choices: Peak if activation checkpointing, or the fused loss, were set otherwise; None where that cannot be.
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
        setup["batch_sizes"] = {str(stream or "any"): rows for stream, rows in self.setup.batch_sizes.items()}
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
                "moments": {moment.name: moment.parts | {"total": moment.total} for moment in self.moments},
                "host": self.host,
                "choices": {name: {str(on).lower(): value for on, value in found.items()} for name, found in self.choices.items()},
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
