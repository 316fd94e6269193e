"""Where a model's architecture is known from: the config, a folder, the hub's cache, a table of published numbers, the hub."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from temper.errors import TemperError
from temper.models.build import check_source
from temper.models.folder import FLAG, first_line, is_adapter, read_json
from temper.models.shape import llama_config
from temper.models.spec import LoRASpec, NetworkSpec

TABLE = "architectures.yaml"


@dataclass(frozen=True)
class Architecture:
    """A configuration of transformers.

    Attributes:
        config: As transformers reads it from a config.json.
        source: Where it came from, in words.
        adapter: Adapter that the folder holds.
    """

    config: Any
    source: str
    adapter: LoRASpec | None = None


def find_architecture(spec: NetworkSpec, vocabulary: int | None = None) -> Architecture:
    """The architecture of a network; no weights are read.

    Args:
        spec: Its shape or path.
        vocabulary: Tokens of the data's tokenizer, for a shape.

    Raises:
        TemperError: neither or both of path and shape; a shape whose vocabulary is not known; a path that is nowhere to be found.
    """
    check_source(spec)
    if spec.shape is not None:
        if vocabulary is None:
            raise TemperError(
                f"{FLAG}.shape: the size of the vocabulary is the tokenizer's; give data.init_args.tokenizer, or data that bring one"
            )
        return Architecture(llama_config(spec.shape, vocabulary), f"{FLAG}.shape, vocabulary of the data")
    folder = Path(str(spec.path))
    if is_adapter(folder):
        return _of_adapter(folder, spec)
    if (folder / "config.json").exists():
        return Architecture(_read(str(folder), spec, local=True), str(folder / "config.json"))
    return _of_name(str(spec.path), spec)


def _of_adapter(folder: Path, spec: NetworkSpec) -> Architecture:
    """The base of an adapter folder, and the adapter."""
    config = read_json(folder / "adapter_config.json")
    targets = config.get("target_modules") or []
    named: Any = "all-linear" if targets == "all-linear" else [targets] if isinstance(targets, str) else list(targets)
    adapter = LoRASpec(int(config.get("r") or 0), int(config.get("lora_alpha") or 0), named)
    base = NetworkSpec(path=str(config.get("base_model_name_or_path")), local_files_only=spec.local_files_only)
    found = find_architecture(base)
    return Architecture(found.config, f"{found.source}, base of the adapter in {folder}", None if spec.adapter == "merge" else adapter)


def _of_name(name: str, spec: NetworkSpec) -> Architecture:
    cached = _read(name, spec, local=True)
    if cached is not None:
        return Architecture(cached, f"the hub's cache ({name})")
    if name.rstrip("/") in _published():
        from transformers import AutoConfig

        numbers = dict(_published()[name.rstrip("/")])
        config = AutoConfig.for_model(numbers.pop("model_type"), **numbers)
        return Architecture(config, f"published numbers of {name} (temper/plan/{TABLE})")
    if not spec.local_files_only:
        return Architecture(_read(name, spec, local=False), f"the hub ({name})")
    raise TemperError(
        f"{FLAG}.path={name}: no config.json there, none in the hub's cache, and not one of the models whose numbers are known here "
        f"({', '.join(sorted(_published()))}); give a folder, or let its config.json be fetched: --{FLAG}.local_files_only=false"
    )


def _read(path: str, spec: NetworkSpec, local: bool) -> Any:
    """A config.json through transformers; None if it is looked for locally and is not there."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            path, revision=spec.revision or "main", local_files_only=local, trust_remote_code=spec.trust_remote_code
        )
        return config.get_text_config()
    except (OSError, ValueError, ImportError) as error:
        if local and not Path(path).is_dir():
            return None
        raise TemperError(
            f"{FLAG}.path={path}: its config.json cannot be had: {first_line(error)}; check the name and the network"
        ) from error


@cache
def _published() -> dict[str, dict[str, Any]]:
    """Numbers by name."""
    entries = yaml.safe_load((files("temper.plan") / TABLE).read_text(encoding="utf-8"))
    return {name: {key: value for key, value in entry.items() if key != "names"} for entry in entries for name in entry["names"]}
