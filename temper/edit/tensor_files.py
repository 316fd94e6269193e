"""Safetensors files read and written one tensor at a time: two models of any size fit beside each other.

``safetensors.torch.save_file`` wants all tensors of a file at once, and a 7B model may be one file.
The format (https://github.com/huggingface/safetensors): 8 bytes with the length of a JSON header,
the header with type, shape and place of every tensor, the tensors' bytes.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Place(NamedTuple):
    """What a tensor is: its type (safetensors' name) and shape."""

    dtype: str
    shape: tuple[int, ...]


def read_places(path: Path) -> dict[str, Place]:
    """Names, types and shapes of the tensors of a file, in the order of their bytes."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    ordered = sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
    return {name: Place(entry["dtype"], tuple(entry["shape"])) for name, entry in ordered}


def write_tensors(path: Path, places: Mapping[str, Place], tensors: Iterable[Tensor]) -> None:
    """Write a file tensor by tensor.

    Args:
        path: Target.
        places: What will come, in this order.
        tensors: The tensors, as `places` says; each is dropped once it is written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, place in places.items():
        start, end = end, end + math.prod(place.shape) * DTYPES[place.dtype].itemsize
        header[name] = {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the bytes of tensors begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, place), tensor in zip(places.items(), tensors, strict=True):
            if Place(NAMES[tensor.dtype], tuple(tensor.shape)) != place:
                raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} where {place} was announced")
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
