"""What every strategy cuts into one part per device, and how much of a tensor that is."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from temper.plan.shapes import Weight

Cut = Callable[[Weight, int], int]


def whole(weight: Weight, devices: int) -> int:
    """Elements on a device: all."""
    return weight.size


def by_rows(weight: Weight, devices: int) -> int:
    """FSDP2 cuts the first dimension; the first ranks have the larger parts."""
    return -(-weight.rows // devices) * (weight.size // weight.rows)


def flat(weight: Weight, devices: int) -> int:
    """DeepSpeed cuts the elements in a row, padded to equal parts."""
    return -(-weight.size // devices)


@dataclass(frozen=True)
class Sharding:
    """How a strategy holds what training needs.

    Attributes:
        weights: Of a weight, elements on a device between passes.
        gradients: Of a gradient.
        state: Of the optimizer's state, and of vectors and copies of the trained weights.
        exact: Float32 copies of the trained weights beside them (DeepSpeed).
        in_passes: Gradients are reduced in every backward pass, not once per step.
        flat_buffer: Reducing makes another vector.
        returns: After a step (and a displacement) the trained weights are gathered again.
    """

    weights: Cut = whole
    gradients: Cut = whole
    state: Cut = whole
    exact: bool = False
    in_passes: bool = True
    flat_buffer: bool = False
    returns: bool = False

    @property
    def gathers(self) -> bool:
        """Weights are gathered layer by layer for every pass."""
        return self.weights is not whole


STRATEGIES: dict[str, Sharding] = {
    "auto": Sharding(in_passes=False),
    "ddp": Sharding(in_passes=False, flat_buffer=True),
    "fsdp2": Sharding(by_rows, by_rows, by_rows),
    "zero1": Sharding(whole, whole, flat, exact=True, returns=True),
    "zero2": Sharding(whole, flat, flat, exact=True, returns=True),
    "zero3": Sharding(flat, flat, flat, exact=True),
}


def elements(weights: Iterable[Weight], cut: Cut, devices: int) -> int:
    """Elements of some weights on one device: the one that has most."""
    return sum(cut(weight, devices) for weight in weights)
