"""What devices send each other in an optimizer step.

Ring algorithms: to reduce or to gather M bytes over n devices, each sends ``M (n - 1) / n``; to reduce for all, twice that.
"""

from dataclasses import dataclass

from temper.plan.cost import Pass
from temper.plan.memory import VECTOR, Memory
from temper.plan.strategies import whole


@dataclass(frozen=True)
class Communication:
    """Of one device and optimizer step.

    Attributes:
        reductions: Times that a whole gradient is reduced.
        gathers: Times that all weights (or, where they are whole on every device, the trained ones) are gathered.
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
