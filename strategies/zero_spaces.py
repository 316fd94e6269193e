"""What the weight spaces of all ZeRO stages have in common.

What is used of DeepSpeed beyond its interface is listed in zero12.py and zero3.py; `strategies.zero_config.check_deepspeed`
keeps other versions out, and two-process tests compare every stage with one process.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from strategies.sharded import ShardedWeightSpace
from strategies.weight_space import Loss
from temper.data import Batch
from temper.errors import TemperError
from temper.losses import MeanTerms


@dataclass(frozen=True)
class Place:
    """Where a rank's piece of a parameter is.

    Attributes:
        group: Which flat part.
        first: First element there.
        last: The element after the last.
        start: The piece's first element in the flattened parameter.
    """

    group: int
    first: int
    last: int
    start: int


class ZeROWeightSpace(ShardedWeightSpace):
    """What the stages share: each pass goes through the engine, once forward and once backward.

    DeepSpeed does not add up the gradients of several backward passes without a word; each is taken out at once.
    """

    places: list[Place]

    @property
    def engine(self) -> Any:
        """DeepSpeed's wrapper around the module."""
        return self.strategy.model  # type: ignore[union-attr]

    def _pass(self, loss: Loss, rows: Batch) -> MeanTerms:
        found: list[MeanTerms] = []

        def forward(part: Batch) -> Tensor:
            # Again: the engine switches off an autocast that it was not told of.
            with self.strategy.precision_plugin.forward_context():  # type: ignore[union-attr]
                found.append(loss(part))
            return found[-1].total

        self.engine.optimizer.zero_grad()
        self._forget_gradients()
        self.engine.backward(self.engine(forward, rows))
        return found[0]

    def _forget_gradients(self) -> None:
        """Zero what holds gradients: a weight that a pass does not reach would show that of the pass before."""

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Of flattened weights, which DeepSpeed cuts without regard to rows."""
        return {name: (place.start, place.start + place.last - place.first) for name, place in zip(self.names, self.places, strict=True)}

    def _pieces(self, likes: list[Tensor]) -> list[Tensor]:
        return [likes[place.group][place.first : place.last] for place in self.places]

    def _owner(self, number: int) -> int:
        return self.places[number].group

    def _exact(self) -> list[Tensor]:
        return self._pieces(self._optimized())

    def _adopt(self) -> None:
        torch._foreach_copy_(self._held(), self._exact())
        self._written()


def refuse_skip(skip: Collection[str]) -> None:
    """Refuse to leave weights out of a step.

    Raises:
        TemperError: there are some to leave out.
    """
    if skip:
        raise TemperError(
            f"trainer.strategy: under ZeRO the optimizer sees one flat vector, and this objective leaves {len(skip)} weights out of "
            "steps, decay and momentum included; use ddp or fsdp2"
        )
