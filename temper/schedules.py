"""Learning-rate schedules whose arguments read well in YAML."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine down to a floor.

    Args:
        optimizer: Optimizer whose rate is scheduled.
        total_steps: Optimizer steps until the floor is reached; it holds afterwards.
        warmup_steps: Steps until the full rate is reached; the first step has rate 1/warmup_steps.
        final_ratio: Floor, as a share of the full rate. 1 keeps the rate constant after warm-up.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        final_ratio: float = 0.1,
    ) -> None:
        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
            return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * done))

        super().__init__(optimizer, factor)
