"""Model folders as named tensors on disk: what they hold, whether they are alike, writing an edited
one.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from temper.errors import TemperError
from temper.models.export import staging_folder
from temper.run_folder import write_json

# MERGED from temper.edit.folders: Safetensors files read and written one tensor at a time: two
# models of any size fit beside each other. |  | ``safetensors.torch.save_file`` wants all tensors
# of a file at once, and a 7B model may be one file. | The format
# (https://github.com/huggingface/safetensors): 8 bytes with the length of a JSON header, | the
# header with type, shape and place of every tensor, the tensors' bytes.


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
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
        header[name] = {
            "dtype": place.dtype,
            "shape": list(place.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the bytes of tensors begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, place), tensor in zip(places.items(), tensors, strict=True):
            if Place(NAMES[tensor.dtype], tuple(tensor.shape)) != place:
                raise ValueError(
                    f"{name}: {tensor.dtype} {tuple(tensor.shape)} where {place} was announced"
                )
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


# MERGED from temper.edit.folders: Weights on the line through two models.


def interpolate(base: str, aligned: str, out: str, a: float = 1.5, a_max: float = 2.5) -> None:
    """Write theta_base + a * (theta_aligned - theta_base): a < 1 interpolates, a > 1 extrapolates
    alignment.

    a = 0 is the base and a = 1 the aligned model, bit for bit. Config and tokenizer are the aligned
    model's.

    Args:
        base: Folder of the model before alignment.
        aligned: Folder of the same network after it.
        out: Folder to write; an earlier model there is replaced.
        a: Place on the line.
        a_max: Largest a that is accepted.

    Raises:
        TemperError: a outside [0, a_max]; folders that are no models, or not the same network.
    """
    if not 0 <= a <= a_max:
        raise TemperError(
            f"--a={a}: give a number in [0, {a_max:g}] (0 is the base, 1 the aligned model);"
            " --a_max moves the upper end"
        )
    start, end = ModelFolder("base", base), ModelFolder("aligned", aligned)
    check_alike(start, end)
    target = check_target(out, start, end)
    card = record("interpolate", {"a": a}, start, end)
    write_edited(
        end, target, lambda name: on_the_line(start.tensor(name), end.tensor(name), a), card
    )


def on_the_line(base: Tensor, aligned: Tensor, a: float) -> Tensor:
    """``base + a * (aligned - base)``, computed in at least float32 and rounded once. Integers are
    not mixed: the aligned model's.

    Args:
        base: A tensor of the base model.
        aligned: The same tensor of the aligned one.
        a: Place on the line; 0 and 1 give the tensors themselves.
    """
    if a == 0:
        return base
    if a == 1 or not base.is_floating_point():
        return aligned
    exact = torch.promote_types(base.dtype, torch.float32)
    start = base.to(exact)
    return (start + a * (aligned.to(exact) - start)).to(base.dtype)


CARD = "edit.json"
ORIGINALS = "removed.safetensors"


class ModelFolder:
    """The weights of a folder in Hugging Face format.

    Args:
        flag: Flag that named the folder, for errors.
        path: The folder.

    Raises:
        TemperError: no such folder, no safetensors in it, or a LoRA adapter instead of a model.
    """

    def __init__(self, flag: str, path: str) -> None:
        self.flag, self.path = flag, Path(path)
        if not self.path.is_dir():
            raise TemperError(
                f"--{flag}={path}: no such folder; give a folder with config.json, such as a run's"
                " export/"
            )
        if (self.path / "adapter_config.json").exists():
            raise TemperError(
                f"--{flag}={path}: a LoRA adapter, and edits need whole weights; export it merged"
                " (HFExport.merge=true, the default), or merge it with peft (merge_and_unload,"
                " save_pretrained)"
            )
        if not (self.path / "config.json").exists():
            raise TemperError(f"--{flag}={path}: no config.json in it; give a run's export/ folder")
        self.files = [
            file for file in sorted(self.path.glob("*.safetensors")) if file.name != ORIGINALS
        ]
        if not self.files:
            raise TemperError(
                f"--{flag}={path}: no *.safetensors in it; load it with transformers and save it"
                " again (save_pretrained)"
            )
        self.places = {file.name: read_places(file) for file in self.files}
        self.file_of = {name: file for file, places in self.places.items() for name in places}
        for name, file in self.file_of.items():
            if self.places[file][name].dtype not in DTYPES:
                raise TemperError(
                    f"--{flag}={path}: {name} is {self.places[file][name].dtype}; give a model in"
                    " F32, BF16 or F16"
                )

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        config: dict[str, Any] = json.loads((self.path / "config.json").read_text())
        return config

    def place(self, name: str) -> Place:
        """Type and shape of a tensor."""
        return self.places[self.file_of[name]][name]

    def tensor(self, name: str) -> Tensor:
        """One tensor, read from disk."""
        with safe_open(self.path / self.file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file of weights."""
        found = {}
        for path in self.files:
            with open(path, "rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return found


def check_alike(first: ModelFolder, *others: ModelFolder) -> None:
    """Refuse folders that are not the same network.

    Raises:
        TemperError: another architecture, other tensors, or other shapes or types of tensors; the
            first that differs is named.
    """
    for other in others:
        pair = f"--{first.flag}={first.path} and --{other.flag}={other.path}"
        for key in ("architectures", "model_type"):
            if first.config.get(key) != other.config.get(key):
                raise TemperError(
                    f"{pair}: {key} is {first.config.get(key)} in one and {other.config.get(key)}"
                    " in the other; give models of one family"
                )
        if missing := sorted(set(first.file_of) ^ set(other.file_of)):
            raise TemperError(
                f"{pair}: {missing[0]} is in one of them alone; give models trained from the same"
                " network"
            )
        for name in first.file_of:
            if first.place(name) != other.place(name):
                raise TemperError(
                    f"{pair}: {name} is {first.place(name)} in one and {other.place(name)} in the"
                    " other; give models of one size and dtype"
                )


def check_target(out: str, *inputs: ModelFolder) -> Path:
    """The folder to write.

    Raises:
        TemperError: it is one of the inputs, or holds something that is no model.
    """
    target = Path(out)
    if any(target.resolve() == folder.path.resolve() for folder in inputs):
        raise TemperError(
            f"--out={out}: is one of the inputs, which would be lost; give another folder"
        )
    if target.exists() and not (target / "config.json").exists():
        raise TemperError(
            f"--out={out}: exists and is no model folder, so it is not replaced; give another"
            " folder"
        )
    return target


def write_edited(
    like: ModelFolder,
    out: Path,
    change: Callable[[str], Tensor],
    card: dict[str, Any],
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Write a folder like another one, with changed weights; it appears under its name when it is
    whole.

    Args:
        like: Gives the layout of files, the config and the tokenizer.
        out: Target; an earlier model there is replaced.
        change: The new tensor of a name.
        card: Content of ``edit.json``.
        extra: Writes more files into the folder.
    """
    weights = set(like.places)
    with staging_folder(out) as staging:
        for file in like.path.iterdir():
            if (
                file.is_file()
                and file.name not in weights | {CARD, ORIGINALS}
                and not file.name.startswith((".", "pytorch_model"))
            ):
                shutil.copy2(file, staging / file.name)
        for name, places in like.places.items():
            write_tensors(staging / name, places, _changed(places, change))
        write_json(staging / CARD, card)
        if extra:
            extra(staging)


def _changed(places: dict[str, Place], change: Callable[[str], Tensor]) -> Iterator[Tensor]:
    for name in places:
        yield change(name)


def record(edit: str, settings: dict[str, Any], *inputs: ModelFolder) -> dict[str, Any]:
    """What ``edit.json`` says: the edit, its settings, and its inputs with the hashes of their
    weights.
    """
    return {
        "edit": edit,
        "settings": settings,
        "inputs": {
            folder.flag: {"path": str(folder.path), "sha256": folder.hashes()} for folder in inputs
        },
    }
