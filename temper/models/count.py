"""How many weights there are, wherever and however they are held."""

import math
from collections.abc import Iterable

from torch import nn


def n_weights(parameters: Iterable[nn.Parameter]) -> int:
    """Weights in parameters; of those that DeepSpeed has cut over ranks (ZeRO-3) and those packed two to a byte (4 bits), all."""
    return sum(map(_size, parameters))


def _size(parameter: nn.Parameter) -> int:
    packed = getattr(parameter, "quant_state", None)  # bitsandbytes
    if packed is not None:
        return math.prod(packed.shape)
    return int(getattr(parameter, "ds_numel", parameter.numel()))
