"""What an objective says about its training step: passes over the data, and what is held meanwhile."""

from dataclasses import dataclass
from typing import Literal

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
        vectors: Vectors (float32, the size of the trained weights) that are held meanwhile, the pass's own gradient not counted.
        displaced: The trained weights are away from where they belong, and a copy of them is kept.
        outputs: Blocks whose outputs (``B x T x D`` of a rank's whole batch) are held for the pass, or ``all``: one per layer.
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
        kind = {"weights": "", "outputs": " (gradient of outputs)", "none": " (forward only)"}[self.gradient]
        return f"{self.stream or primary}{' at displaced weights' if self.displaced else ''}{kind}"


@dataclass(frozen=True)
class Cost:
    """One optimizer step of an objective, where it needs the most memory.

    Attributes:
        passes: In the order in which they happen.
        vectors: Vectors that are alive at the optimizer's step beside the gradient that it reads.
        unreduced: More of them where reducing a gradient over ranks makes a new one (DDP).
        copies: Copies of the whole network that stay in memory: a frozen reference.
        reductions: Reductions of a whole gradient per step, where passes do not reduce by themselves (DDP).
        trains: Pattern (`re.search`) of the names of the weights that are trained; None: all, or the adapter.
        optimizer: Whether there is an optimizer with a state.
    """

    passes: tuple[Pass, ...]
    vectors: int = 0
    unreduced: int = 0
    copies: int = 0
    reductions: float = 1.0
    trains: str | None = None
    optimizer: bool = True
