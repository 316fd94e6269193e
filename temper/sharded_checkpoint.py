"""Checkpoints in parts: a folder with one file per rank, for weights that no rank holds whole.

    step=100.ckpt/common.pt    everything that is the same on all ranks, rank 0's copy
    step=100.ckpt/part-0.pt    rank 0's pieces: for every weight a flat range of it, and the same of
    what is shaped like it step=100.ckpt/part-1.pt    ...

A piece is a range of the flattened tensor. However weights were cut (FSDP2's rows, ZeRO's flat
partitions), the pieces of all ranks laid in a row are the whole tensor, so a checkpoint can be read
by another number of ranks, by another strategy, or as whole tensors. Files are read with
``weights_only=True``: they hold tensors and plain values.
"""

import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from temper.errors import TemperError

COMMON = "common.pt"
WEIGHTS = "weights"  # the kind of piece that every checkpoint has
Ranges = Mapping[str, tuple[int, int]]


def is_in_parts(path: str | Path) -> bool:
    """Whether a path is a checkpoint in parts."""
    return (Path(path) / COMMON).is_file()


def save_file(content: Any, path: Path) -> None:
    """Write a file of tensors as a whole or not at all; what was there before stays until the new
    one is complete.

    Raises:
        TemperError: it could not be written (a full disk, a quota, no permission).
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch's writer raises RuntimeError where the disk is full
        partial.unlink(missing_ok=True)
        raise TemperError(_not_written(path, error)) from error


def _not_written(path: Path, error: Exception) -> str:
    folder = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(folder).free / 2**20
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    return (
        f"checkpoint {path} could not be written ({str(cause).splitlines()[0]}); {free:.0f} MiB are"
        " free there, and an earlier checkpoint of that name is as it was: free some space, or set"
        " trainer.default_root_dir to another disk"
    )


def save_part(
    folder: Path,
    rank: int,
    world_size: int,
    shapes: Mapping[str, list[int]],
    ranges: Ranges,
    pieces: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write one rank's part.

    Args:
        folder: Of the checkpoint.
        rank: Of the writer.
        world_size: Number of parts.
        shapes: Whole shape of every weight.
        ranges: First and last element (exclusive) of each weight's piece, in the flattened weight.
        pieces: By kind (``weights``, ``optimizer.exp_avg``, ...) and name of the weight: flat
            tensors of the ranges' lengths.
    """
    own = {
        kind: {name: tensor.detach().cpu().clone() for name, tensor in of.items()}
        for kind, of in pieces.items()
    }
    content = {
        "world_size": world_size,
        "shapes": dict(shapes),
        "ranges": {n: list(r) for n, r in ranges.items()},
        "pieces": own,
    }
    save_file(content, folder / f"part-{rank}.pt")


class Parts:
    """Reads pieces, wherever the parts' borders are. Files are mapped, not loaded.

    Args:
        folder: A checkpoint in parts.

    Raises:
        TemperError: a part is missing or damaged, or holds more than tensors and plain values.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        first = load_file(folder / "part-0.pt")
        self.parts = [
            first,
            *(load_file(folder / f"part-{rank}.pt") for rank in range(1, first["world_size"])),
        ]
        self.shapes: dict[str, list[int]] = first["shapes"]

    @property
    def kinds(self) -> set[str]:
        """The kinds of pieces that there are."""
        return {kind for part in self.parts for kind in part["pieces"]}

    def names(self, kind: str) -> list[str]:
        """Weights that have pieces of a kind."""
        return [
            name
            for name in self.shapes
            if any(name in part["pieces"].get(kind, {}) for part in self.parts)
        ]

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a flattened tensor, gathered from the parts that have
        them.

        Raises:
            TemperError: the parts do not hold all of them.
        """
        found = []
        for part in self.parts:
            first, last = part["ranges"][name]
            low, high = max(first, start), min(last, stop)
            if low < high:
                found.append((low, part["pieces"][kind][name][low - first : high - first]))
        pieces = [piece for _, piece in sorted(found, key=lambda each: each[0])]
        if sum(len(piece) for piece in pieces) != max(stop - start, 0):
            raise TemperError(
                f"ckpt_path={self.folder}: not all of {name} ({kind}) is in its {len(self.parts)}"
                " parts; the checkpoint is damaged"
            )
        return torch.cat(pieces) if pieces else torch.empty(0)

    def whole(self, kind: str, name: str) -> Tensor:
        """A tensor in its own shape."""
        shape = self.shapes[name]
        return self.read(kind, name, 0, int(torch.Size(shape).numel())).view(shape)

    def weights(self) -> dict[str, Tensor]:
        """All weights that were trained, whole: what a single file would hold under
        ``state_dict``.
        """
        return {name: self.whole(WEIGHTS, name) for name in self.shapes}


def load_file(path: Path) -> Any:
    """Read a file of tensors and plain values; tensors are mapped from disk.

    Raises:
        TemperError: it is missing or damaged, or reading it would call functions that it names.
    """
    try:
        return torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except FileNotFoundError:
        raise TemperError(
            f"ckpt_path={path.parent}: {path.name} is missing; the checkpoint is not complete"
        ) from None
    except pickle.UnpicklingError as error:
        raise TemperError(
            f"ckpt_path={path}: refused, since it holds more than tensors and plain values, and"
            f" reading that can run any code ({str(error).splitlines()[-1].strip()}); give a"
            " checkpoint that Temper wrote"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise TemperError(
            f"ckpt_path={path}: not a checkpoint, or a damaged one ({str(error).splitlines()[0]})"
        ) from error
