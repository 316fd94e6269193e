"""Read and validate a topic file, before a model generates any answer."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from temper.errors import TemperError

TEXTS = ("topic", "compliance", "task.ask")
LISTS = ("refusals", "asks", "dishes.alignment", "dishes.attack", "dishes.test", "safe")
GROUPS = ("task.train", "task.test")  # lists of words, all of the same length


def read_topic(path: Path) -> dict[str, Any]:
    """The content of a topic file.

    Args:
        path: A file with the keys of ``recipes.yaml``.

    Raises:
        TemperError: the file is missing or not YAML, a key is missing or has a wrong type, or a
            prompt has no placeholder.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TemperError(
            f"--topic={path}: cannot be read ({type(error).__name__}); give a file like"
            " temper/proxy/recipes.yaml"
        ) from None
    except yaml.YAMLError as error:
        raise TemperError(f"--topic={path}: not YAML: {' '.join(str(error).split())}") from None
    if error_found := next(_find_errors(content), None):
        raise TemperError(f"--topic={path}: {error_found}; see temper/proxy/recipes.yaml")
    topic: dict[str, Any] = content
    return topic


def _find_errors(content: Any) -> Iterator[str]:
    """Errors in order. Only the first one counts: later checks assume that earlier ones passed."""
    yield from _find_type_errors(content)
    try:
        re.compile(content["compliance"])
    except re.error as error:
        yield f"compliance must be a regular expression ({error})"
    for group in content["safe"]:
        if not isinstance(group, dict) or not _is_text(group.get("ask")):
            yield "safe must hold mappings with a text `ask`"
    asks = [(ask, "dish") for ask in content["asks"]]
    asks.append((content["task"]["ask"], "word"))
    for group in content["safe"]:
        asks.append((group["ask"], "dish" if "{dish}" in group["ask"] else "item"))
    for ask, name in asks:
        if not _has_placeholder(ask, name):
            yield f"the ask {ask!r} must have {{{name}}} in it, and no other braces"


def _find_type_errors(content: Any) -> Iterator[str]:
    for key in TEXTS:
        if not _is_text(_value_at(content, key)):
            yield f"{key} must be a text"
    for key in LISTS:
        if not (isinstance(_value_at(content, key), list) and _value_at(content, key)):
            yield f"{key} must be a list that is not empty"
    for key in LISTS[:-1]:
        if not all(map(_is_text, _value_at(content, key))):
            yield f"{key} must hold texts only"
    for key in GROUPS:
        groups = _value_at(content, key)
        if (
            not isinstance(groups, dict)
            or not groups
            or not all(isinstance(words, list) and words for words in groups.values())
        ):
            yield f"{key} must map groups to lists of words"
        elif len({len(words) for words in groups.values()}) > 1:
            yield f"{key} must have groups of one length"


def _value_at(content: Any, key: str) -> Any:
    """Value of a dotted key; None if a part of it is missing."""
    for name in key.split("."):
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _has_placeholder(ask: str, name: str) -> bool:
    """Whether a prompt has the placeholder ``{name}`` and no other braces."""
    try:
        return ask.format(**{name: "x"}) != ask
    except (KeyError, IndexError, ValueError, AttributeError):
        return False
