"""Communication of small Python objects between ranks."""

from typing import Any

import torch.distributed as dist


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank, in order of rank, on every rank; all ranks call it.

    In a process without a process group: ``[value]``.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
