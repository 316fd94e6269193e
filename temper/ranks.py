"""Small things that ranks tell each other."""

from typing import Any

import torch.distributed as dist


def gather_objects(value: Any) -> list[Any]:
    """What every rank gives, in order of rank; on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
