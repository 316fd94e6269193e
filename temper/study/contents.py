"""The parts of a config that concern training, answering and judging, each hashed by itself."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

JUDGING = "SafetyEvaluation"  # the callback that judges


@cache
def read_config(config: str) -> dict[str, Any]:
    """The content of a config file."""
    return yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}


def callbacks(content: Mapping[str, Any]) -> Iterator[Any]:
    """The callbacks of a config: names, or class paths with arguments."""
    trainer = content.get("trainer") or {}
    for key in ("callbacks", "callbacks+"):
        found = trainer.get(key) or []
        yield from found if isinstance(found, list) else [found]


def _is_judging(callback: Any) -> bool:
    name = callback.get("class_path", "") if isinstance(callback, dict) else callback
    return str(name).rpartition(".")[2] == JUDGING


def _with_callbacks(trainer: Mapping[str, Any], judging: bool) -> dict[str, Any]:
    """The trainer's settings with the callbacks that judge, or with the others."""
    found = dict(trainer)
    for key in found.keys() & {"callbacks", "callbacks+"}:
        chosen = found[key] if isinstance(found[key], list) else [found[key]]
        found[key] = [one for one in chosen if one is not None and _is_judging(one) is judging]
    return found


def training(content: Mapping[str, Any]) -> dict[str, Any]:
    """The config without judges."""
    found = dict(content)
    if "trainer" in content:
        found["trainer"] = _with_callbacks(content["trainer"] or {}, judging=False)
    if "data" in content:
        data = content["data"] or {}
        arguments = data.get("init_args") or {}
        found["data"] = {key: one for key, one in data.items() if key != "judge"} | {
            "init_args": {key: one for key, one in arguments.items() if key != "judge"}
        }
    return found


def answering(content: Mapping[str, Any]) -> dict[str, Any]:
    """The config without judges, and with only the network of the objective."""
    found = training(content)
    if "model" in found:
        model = found.pop("model") or {}
        arguments = model | (model.get("init_args") or {})  # `init_args` may be left out
        kept = {key: arguments[key] for key in ("network", "max_new_tokens") if key in arguments}
        found["network"] = kept
    return found


def judging(content: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a config, and its callbacks that judge."""
    found = {"data": content["data"]} if content.get("data") else {}
    trainer = _with_callbacks(content.get("trainer") or {}, judging=True)
    asked = {key: one for key, one in trainer.items() if key in ("callbacks", "callbacks+")}
    return found | ({"trainer": asked} if asked else {})


def strings(value: Any) -> Iterator[str]:
    """Every string in nested settings: some of them name classes."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from strings(one)
    elif isinstance(value, Iterable):
        for one in value:
            yield from strings(one)
