"""Model folders as named tensors on disk: what they hold, whether they are alike, writing an edited one."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from temper.edit.tensor_files import DTYPES, Place, read_places, write_tensors
from temper.errors import TemperError
from temper.models.export import replacing
from temper.run_folder import write_json

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
            raise TemperError(f"--{flag}={path}: no such folder; give a folder with config.json, such as a run's export/")
        if (self.path / "adapter_config.json").exists():
            raise TemperError(
                f"--{flag}={path}: a LoRA adapter, and edits need whole weights; export it merged (HFExport.merge=true, the default), "
                "or merge it with peft (merge_and_unload, save_pretrained)"
            )
        if not (self.path / "config.json").exists():
            raise TemperError(f"--{flag}={path}: no config.json in it; give a run's export/ folder")
        self.files = [file for file in sorted(self.path.glob("*.safetensors")) if file.name != ORIGINALS]
        if not self.files:
            raise TemperError(f"--{flag}={path}: no *.safetensors in it; load it with transformers and save it again (save_pretrained)")
        self.places = {file.name: read_places(file) for file in self.files}
        self.file_of = {name: file for file, places in self.places.items() for name in places}
        for name, file in self.file_of.items():
            if self.places[file][name].dtype not in DTYPES:
                raise TemperError(f"--{flag}={path}: {name} is {self.places[file][name].dtype}; give a model in F32, BF16 or F16")

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
        TemperError: another architecture, other tensors, or other shapes or types of tensors; the first that differs is named.
    """
    for other in others:
        pair = f"--{first.flag}={first.path} and --{other.flag}={other.path}"
        for key in ("architectures", "model_type"):
            if first.config.get(key) != other.config.get(key):
                raise TemperError(
                    f"{pair}: {key} is {first.config.get(key)} in one and {other.config.get(key)} in the other; give models of one family"
                )
        if missing := sorted(set(first.file_of) ^ set(other.file_of)):
            raise TemperError(f"{pair}: {missing[0]} is in one of them alone; give models trained from the same network")
        for name in first.file_of:
            if first.place(name) != other.place(name):
                raise TemperError(
                    f"{pair}: {name} is {first.place(name)} in one and {other.place(name)} in the other; give models of one size and dtype"
                )


def check_target(out: str, *inputs: ModelFolder) -> Path:
    """The folder to write.

    Raises:
        TemperError: it is one of the inputs, or holds something that is no model.
    """
    target = Path(out)
    if any(target.resolve() == folder.path.resolve() for folder in inputs):
        raise TemperError(f"--out={out}: is one of the inputs, which would be lost; give another folder")
    if target.exists() and not (target / "config.json").exists():
        raise TemperError(f"--out={out}: exists and is no model folder, so it is not replaced; give another folder")
    return target


def write_edited(
    like: ModelFolder, out: Path, change: Callable[[str], Tensor], card: dict[str, Any], extra: Callable[[Path], None] | None = None
) -> None:
    """Write a folder like another one, with changed weights; it appears under its name when it is whole.

    Args:
        like: Gives the layout of files, the config and the tokenizer.
        out: Target; an earlier model there is replaced.
        change: The new tensor of a name.
        card: Content of ``edit.json``.
        extra: Writes more files into the folder.
    """
    weights = set(like.places)
    with replacing(out) as staging:
        for file in like.path.iterdir():
            if file.is_file() and file.name not in weights | {CARD, ORIGINALS} and not file.name.startswith((".", "pytorch_model")):
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
    """What ``edit.json`` says: the edit, its settings, and its inputs with the hashes of their weights."""
    return {
        "edit": edit,
        "settings": settings,
        "inputs": {folder.flag: {"path": str(folder.path), "sha256": folder.hashes()} for folder in inputs},
    }
