"""Edits between model folders: reading weights tensor by tensor, checking that folders match,
writing the edited model, and interpolation of weights.

Tensors are read and written one at a time, so models of any size can be edited in little memory.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from temper.errors import TemperError
from temper.links import check_links
from temper.models.weight_files import MODEL_WEIGHTS, TensorInfo, read_header, weight_files
from temper.output_folder import check_target, staging_folder
from temper.run_folder import write_json

WRITER = "temper edit"  # in the marker of the folder
CARD = "edit.json"
ORIGINALS = "removed.safetensors"  # original values of the entries that remove-harm changed

# -- safetensors files
#
# ``safetensors.torch.save_file`` needs all tensors of a file in memory; a 7B model may be one file.
# The format (https://github.com/huggingface/safetensors): 8 bytes with the length of a JSON header,
# the header with dtype, shape and byte range of every tensor, then the tensors' bytes.

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


def write_tensors(path: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file one tensor at a time.

    Args:
        path: File to write.
        infos: Names, dtypes and shapes of the tensors, in the order in which they follow.
        tensors: The tensors; each is released once it is written.

    Raises:
        ValueError: a tensor has another dtype or shape than its entry in ``infos``.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in infos.items():
        start = end
        end += math.prod(info.shape) * DTYPES[info.dtype].itemsize
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # align the tensors' bytes to 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, info), tensor in zip(infos.items(), tensors, strict=True):
            found = TensorInfo(NAMES[tensor.dtype], tuple(tensor.shape))
            if found != info:
                raise ValueError(f"{name}: got {found}, expected {info}")
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


# -- model folders


class ModelFolder:
    """Weights and config of a model folder in Hugging Face format, read on demand.

    Args:
        flag: Flag that named the folder, for error messages.
        path: The folder.

    Raises:
        TemperError: no such folder, no config or safetensors in it, unsupported dtype, or a LoRA
            adapter instead of a model.
    """

    def __init__(self, flag: str, path: str) -> None:
        self.flag = flag
        self.path = Path(path)
        self._check_config()
        where = f"--{flag}={path}"
        check_links(self.path, where)
        self.files = weight_files(self.path, where)
        if not self.files:
            raise TemperError(
                f"{where}: no {MODEL_WEIGHTS} in it; load it with transformers and save it"
                " again (save_pretrained)"
            )
        self.headers = {file.name: read_header(file, where) for file in self.files}
        self.file_of = {name: file for file, infos in self.headers.items() for name in infos}
        for name in self.file_of:
            if self.info(name).dtype not in DTYPES:
                raise TemperError(
                    f"{where}: {name} is {self.info(name).dtype}; give a model in F32, BF16 or F16"
                )

    def _check_config(self) -> None:
        flag = f"--{self.flag}={self.path}"
        if not self.path.is_dir():
            raise TemperError(
                f"{flag}: no such folder; give a folder with config.json, such as a run's export/"
            )
        if (self.path / "adapter_config.json").exists():
            raise TemperError(
                f"{flag}: a LoRA adapter, and edits need the weights of a whole model; export it"
                " merged (HFExport.merge=true, or temper export --merge=true), or merge it with"
                " peft (merge_and_unload, save_pretrained)"
            )
        if not (self.path / "config.json").exists():
            raise TemperError(f"{flag}: no config.json in it; give a run's export/ folder")

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of config.json."""
        config: dict[str, Any] = json.loads((self.path / "config.json").read_text())
        return config

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""
        return self.headers[self.file_of[name]][name]

    def tensor(self, name: str) -> Tensor:
        """Read one tensor from disk."""
        with safe_open(self.path / self.file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every weight file, by file name."""
        digests = {}
        for path in self.files:
            with open(path, "rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return digests


def check_same_network(first: ModelFolder, *others: ModelFolder) -> None:
    """Raise unless all folders hold the same network: architecture, tensor names, shapes, dtypes.

    Raises:
        TemperError: names the first difference.
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
                f"{pair}: only one of them has {missing[0]}; give models trained from the same"
                " network"
            )
        for name in first.file_of:
            if first.info(name) != other.info(name):
                raise TemperError(
                    f"{pair}: {name} is {first.info(name)} in one and {other.info(name)} in the"
                    " other; give models of one size and dtype"
                )


def check_output_folder(out: str, *inputs: ModelFolder) -> Path:
    """Path of the folder to write, once it is known that nothing of value is overwritten.

    Raises:
        TemperError: it is one of the inputs, or holds files that Temper did not write.
    """
    target = Path(out)
    if any(target.resolve() == folder.path.resolve() for folder in inputs):
        raise TemperError(
            f"--out={out}: is one of the inputs, which would be overwritten; give another folder"
        )
    return check_target(target, "--out", WRITER)


# -- writing an edited model


def write_edited_model(
    source: ModelFolder,
    out: Path,
    edited_tensor: Callable[[str], Tensor],
    card: dict[str, Any],
    write_extra: Callable[[Path], None] | None = None,
) -> None:
    """Write a copy of a model folder with new weights; the folder appears once it is complete.

    Args:
        source: Gives the weight files' layout, the config and the tokenizer.
        out: Folder to write: new, or one that an edit wrote.
        edited_tensor: Returns the new value of a tensor, by name.
        card: Content of ``edit.json``.
        write_extra: Writes further files into the folder.
    """
    # Any other safetensors would be weights that were not edited.
    not_copied = ("*.safetensors", "pytorch_model*", ".*", CARD)
    with staging_folder(out, "--out", WRITER) as staging:
        for file in source.path.iterdir():
            if file.is_file() and not any(map(file.match, not_copied)):
                shutil.copy2(file, staging / file.name)
        for file_name, infos in source.headers.items():
            write_tensors(staging / file_name, infos, map(edited_tensor, infos))
        write_json(staging / CARD, card)
        if write_extra:
            write_extra(staging)


def edit_card(edit: str, settings: dict[str, Any], *inputs: ModelFolder) -> dict[str, Any]:
    """Content of ``edit.json``: name and settings of an edit, paths and hashes of its inputs."""
    return {
        "edit": edit,
        "settings": settings,
        "inputs": {
            folder.flag: {"path": str(folder.path), "sha256": folder.hashes()} for folder in inputs
        },
    }


# -- interpolation


def interpolate(base: str, aligned: str, out: str, a: float = 1.5, a_max: float = 2.5) -> None:
    """Write theta_base + a * (theta_aligned - theta_base): a < 1 interpolates, a > 1 extrapolates
    alignment.

    a = 0 is the base and a = 1 the aligned model, bit for bit. Config and tokenizer are the aligned
    model's.

    Args:
        base: Folder of the model before alignment.
        aligned: Folder of the same network after alignment.
        out: Folder to write: new, or one that an edit wrote.
        a: Interpolation coefficient.
        a_max: Largest a that is accepted.

    Raises:
        TemperError: a outside [0, a_max]; folders that are no models, or not the same network.
    """
    if not 0 <= a <= a_max:
        raise TemperError(
            f"--a={a}: give a number in [0, {a_max:g}] (0 is the base, 1 the aligned model);"
            " --a_max moves the upper end"
        )
    start = ModelFolder("base", base)
    end = ModelFolder("aligned", aligned)
    check_same_network(start, end)
    target = check_output_folder(out, start, end)
    card = edit_card("interpolate", {"a": a}, start, end)

    def edited_tensor(name: str) -> Tensor:
        return interpolate_tensor(start.tensor(name), end.tensor(name), a)

    write_edited_model(end, target, edited_tensor, card)


def interpolate_tensor(base: Tensor, aligned: Tensor, a: float) -> Tensor:
    """``base + a * (aligned - base)``, computed in at least float32 and rounded once.

    Integer tensors are not interpolated; they are the aligned model's.

    Args:
        base: A tensor of the base model.
        aligned: The same tensor of the aligned model.
        a: Coefficient; 0 and 1 return the tensors themselves.
    """
    if a == 0:
        return base
    if a == 1 or not base.is_floating_point():
        return aligned
    exact = torch.promote_types(base.dtype, torch.float32)
    start = base.to(exact)
    return (start + a * (aligned.to(exact) - start)).to(base.dtype)
