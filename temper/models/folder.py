"""Where models are: folders, names on the hub, the base of an adapter, the tokenizer."""

import json
import re
from pathlib import Path
from typing import Any

from temper.errors import TemperError
from temper.models.spec import NetworkSpec

FLAG = "model.init_args.network"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
FILES = ["*.json", "*.jinja", "*.model", "*.txt"]  # what is fetched from a hub, beside weights: no pickles
WEIGHTS = "*.safetensors"
DOUBLES = ["original/*", "consolidated*"]  # the same weights again, in other tools' formats


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, not a whole network."""
    return (folder / "adapter_config.json").exists()


def model_folder(
    path: str, revision: str | None = None, local_files_only: bool = True, trust_remote_code: bool = False, weights: bool = True
) -> Path:
    """The folder that a path or a hub name stands for.

    Args:
        path: A folder, or ``org/name``.
        revision: Branch, tag or commit of a hub name.
        local_files_only: Look in the local cache only; otherwise what is missing there is fetched.
        trust_remote_code: Fetch Python files too.
        weights: Fetch the weights too.

    Raises:
        TemperError: no such folder, nor a model of that name in the cache (or on the hub); a revision of a folder.
    """
    if path and Path(path).is_dir():
        if revision is not None:
            raise TemperError(f"{FLAG}.revision={revision}: path={path} is a folder, which has no revisions; drop it, or give a hub name")
        return Path(path)
    if not HUB_NAME.fullmatch(path):
        raise TemperError(f"{FLAG}.path={path}: no such folder; give a folder with config.json, such as a run's export/")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    files = [*FILES, *([WEIGHTS] if weights else []), *(["*.py"] if trust_remote_code else [])]
    try:
        fetched = snapshot_download(
            path, revision=revision, local_files_only=local_files_only, allow_patterns=files, ignore_patterns=DOUBLES
        )
        return Path(fetched)
    except (OSError, ValueError, HfHubHTTPError) as error:
        of = f" (revision {revision})" if revision else ""
        if local_files_only:
            raise TemperError(
                f"{FLAG}.path={path}: no such folder, and no model of that name{of} in the local hub cache; give a folder with "
                f"config.json, such as a run's export/, or let it be fetched from the hub: --{FLAG}.local_files_only=false"
            ) from error
        raise TemperError(
            f"{FLAG}.path={path}: no such folder, and the hub did not give a model of that name{of}: {first_line(error)}; check name, "
            "network and access (hf auth login; some models ask for consent on their page)"
        ) from error


def spec_folder(spec: NetworkSpec, weights: bool = True) -> Path:
    """`model_folder` of a spec's path."""
    return model_folder(str(spec.path), spec.revision, spec.local_files_only, spec.trust_remote_code, weights)


def base_folder(folder: Path, spec: NetworkSpec, weights: bool = True) -> Path:
    """The folder of the network that an adapter was trained on.

    Raises:
        TemperError: it is gone.
    """
    config = read_json(folder / "adapter_config.json")
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    try:
        return model_folder(
            str(base or ""), None if base and Path(base).is_dir() else revision, spec.local_files_only, spec.trust_remote_code, weights
        )
    except TemperError as error:
        raise TemperError(
            f"{FLAG}.path={spec.path}: its adapter_config.json names the base {base}, which is no folder and not in the hub cache; "
            "put it back, edit base_model_name_or_path, or set local_files_only=false if it is a hub name"
        ) from error


def tokenizer_folder(spec: NetworkSpec) -> Path:
    """Where the tokenizer of a network is: beside it, or beside the base of an adapter that came without one. Fetches no weights.

    Raises:
        TemperError: as `model_folder`; or there is none.
    """
    folder = spec_folder(spec, weights=False)
    places = [folder, base_folder(folder, spec, weights=False)] if is_adapter(folder) and not _has_tokenizer(folder) else [folder]
    for place in places:
        if _has_tokenizer(place):
            return place
    raise TemperError(f"{FLAG}.path={spec.path}: no tokenizer.json in it; save the tokenizer beside the model (tokenizer.save_pretrained)")


def read_json(path: Path) -> dict[str, Any]:
    """What is in a JSON file of a model folder.

    Raises:
        TemperError: it is not an object in JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TemperError(f"{FLAG}.path: {path} cannot be read: {first_line(error)}; save the model again (save_pretrained)") from error
    if not isinstance(content, dict):
        raise TemperError(f"{FLAG}.path: {path} holds no JSON object; save the model again (save_pretrained)")
    return content


def first_line(error: Exception) -> str:
    """What an error says, without what follows it."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model"))
