"""Which weight space belongs to which Lightning strategy."""

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from torch import nn

from strategies.ddp import DDPWeightSpace
from strategies.weight_space import WeightSpace
from temper.errors import TemperError

# First match wins. DeepSpeedStrategy inherits from DDPStrategy and must not be taken for it: its
# gradients are not where DDP's are.
_SPACES: tuple[tuple[type[Strategy], type[WeightSpace] | None], ...] = (
    (DeepSpeedStrategy, None),
    (SingleDeviceStrategy, WeightSpace),
    (DDPStrategy, DDPWeightSpace),
)


def check_strategy(strategy: Strategy) -> type[WeightSpace]:
    """The weight space class for a strategy.

    Raises:
        TemperError: no weight space is written for it.
    """
    for kind, space in _SPACES:
        if isinstance(strategy, kind) and space is not None:
            return space
        if isinstance(strategy, kind):
            break
    raise TemperError(f"trainer.strategy={type(strategy).__name__}: no weight space for it yet; use 'auto' (one device) or 'ddp'")


def weight_space(strategy: Strategy, module: nn.Module) -> WeightSpace:
    """Weight space over the trainable parameters of a module under a strategy."""
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise TemperError("no trainable parameters: every weight is frozen (check model.init_args.network.lora)")
    return check_strategy(strategy)(trainable)
