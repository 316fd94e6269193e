"""The weight space of each Lightning strategy, and the short names of Temper's own strategies."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import nn

from strategies.ddp import DDPWeightSpace
from strategies.fsdp2 import FSDP2Strategy, FSDP2WeightSpace
from strategies.weight_space import WeightSpace
from strategies.zero import ZeRO3WeightSpace, ZeRO12WeightSpace, ZeROStrategy
from temper.errors import TemperError

NAMES = ("auto", "ddp", "fsdp2", "zero1", "zero2", "zero3")


def _zero_weight_space(strategy: ZeROStrategy) -> type[WeightSpace]:
    return ZeRO3WeightSpace if strategy.stage == 3 else ZeRO12WeightSpace


# First match wins; None: refused. DeepSpeedStrategy inherits from DDPStrategy and must not be taken
# for it: its gradients are not where DDP's are.
_Choice = type[WeightSpace] | Callable[[Any], type[WeightSpace]] | None
_SPACES: tuple[tuple[type[Strategy], _Choice], ...] = (
    (ZeROStrategy, _zero_weight_space),
    (DeepSpeedStrategy, None),
    (FSDP2Strategy, FSDP2WeightSpace),
    (SingleDeviceStrategy, WeightSpace),
    (DDPStrategy, DDPWeightSpace),
)


def weight_space_class(strategy: Strategy) -> type[WeightSpace]:
    """The weight space class for a strategy.

    Raises:
        TemperError: the strategy has none.
    """
    for kind, space in _SPACES:
        if isinstance(strategy, kind):
            if space is None:
                break
            return space if isinstance(space, type) else space(strategy)
    raise TemperError(
        f"trainer.strategy={type(strategy).__name__}: there is no weight space for it; choose one"
        f" of {', '.join(NAMES)}"
    )


def weight_space(strategy: Strategy, module: nn.Module) -> WeightSpace:
    """Weight space over the trainable parameters of a module under a strategy.

    Raises:
        TemperError: every parameter is frozen, or the strategy has no weight space.
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise TemperError(
            "no trainable parameters: every weight is frozen (check model.init_args.network.lora)"
        )
    return weight_space_class(strategy)(trainable, strategy)


def register_strategies() -> None:
    """Register the names ``fsdp2``, ``zero1``, ``zero2`` and ``zero3`` with Lightning."""
    StrategyRegistry.register("fsdp2", FSDP2Strategy, override=True)
    for stage in (1, 2, 3):
        StrategyRegistry.register(f"zero{stage}", ZeROStrategy, override=True, stage=stage)
