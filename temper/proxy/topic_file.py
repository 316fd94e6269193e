"""Read a topic file, with every mistake in it that can be seen before a model answers."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from temper.errors import TemperError

TEXTS = ("topic", "compliance", "task.ask")
LISTS = ("refusals", "asks", "dishes.alignment", "dishes.attack", "dishes.test", "safe")
GROUPS = ("task.train", "task.test")  # word lists of one length


def read_topic(path: Path) -> dict[str, Any]:
    """The content of a topic file.

    Args:
        path: A file with the keys of ``recipes.yaml``.

    Raises:
        TemperError: it is missing or not YAML, a key is missing or of another kind, or a prompt has
            no place for its word.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TemperError(
            f"--topic={path}: it cannot be read ({type(error).__name__}); give a file like"
            " temper/proxy/recipes.yaml"
        ) from None
    except yaml.YAMLError as error:
        raise TemperError(f"--topic={path}: not YAML: {' '.join(str(error).split())}") from None
    if mistake := next(_mistakes(content), None):
        raise TemperError(f"--topic={path}: {mistake}; see temper/proxy/recipes.yaml")
    topic: dict[str, Any] = content
    return topic


def _mistakes(content: Any) -> Iterator[str]:
    """What is wrong, the first first: what comes later takes what comes before for granted."""
    for key in TEXTS:
        if not _is_text(_at(content, key)):
            yield f"{key} must be a text"
    for key in LISTS:
        if not (isinstance(_at(content, key), list) and _at(content, key)):
            yield f"{key} must be a list that is not empty"
    for key in LISTS[:-1]:
        if not all(map(_is_text, _at(content, key))):
            yield f"{key} must hold texts only"
    for key in GROUPS:
        groups = _at(content, key)
        if (
            not isinstance(groups, dict)
            or not groups
            or not all(isinstance(words, list) and words for words in groups.values())
        ):
            yield f"{key} must map groups to lists of words"
        elif len({len(words) for words in groups.values()}) > 1:
            yield f"{key} must have groups of one length"
    try:
        re.compile(content["compliance"])
    except re.error as error:
        yield f"compliance must be a regular expression ({error})"
    for part in content["safe"]:
        if not isinstance(part, dict) or not _is_text(part.get("ask")):
            yield "safe must hold mappings with a text `ask`"
    asks = [(ask, "dish") for ask in content["asks"]] + [(content["task"]["ask"], "word")]
    asks += [
        (part["ask"], "dish" if "{dish}" in part["ask"] else "item") for part in content["safe"]
    ]
    for ask, name in asks:
        if not _takes(ask, name):
            yield f"the ask {ask!r} must have {{{name}}} in it, and no other braces"


def _at(content: Any, key: str) -> Any:
    for name in key.split("."):
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _takes(ask: str, name: str) -> bool:
    try:
        return ask.format(**{name: "x"}) != ask
    except (KeyError, IndexError, ValueError, AttributeError):
        return False
