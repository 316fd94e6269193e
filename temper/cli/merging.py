"""How several configs and flags become one config: rules of docs/cli.md that jsonargparse lacks.

- A list or a dictionary of classes is replaced whole by a later one. jsonargparse lets a class
  inherit the arguments of the class at the same place of the earlier list.
- The text of a flag stays text until the option that it is for reads it. jsonargparse reads it
  first and formats it again on the way down: ``null`` becomes the word None, and a commit such as
  ``12e4567`` becomes infinity.
- A flag or a file may set arguments of a class that a later one names.
- Arguments that are dropped because their class is replaced are said.
"""

import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import yaml

from temper.cli.renamed import translated
from temper.errors import TemperError
from temper.slurm import is_first_process

# -- jsonargparse's own functions, which it calls by their names in its module

_typehints: Any = importlib.import_module("jsonargparse._typehints")
_loaders: Any = importlib.import_module("jsonargparse._loaders_dumpers")
_COLLECTIONS = (_typehints.sequence_origin_types, _typehints.mapping_origin_types)


def apply_rules() -> None:
    """Let jsonargparse follow the rules of this module, from now on and in this whole process."""
    for name, rule in (
        ("adapt_typehints", _adapted),
        ("discard_init_args_on_class_path_change", _discarded),
    ):
        original = getattr(_typehints, name)
        if not hasattr(original, "rule_over"):
            wrapped: Any = functools.wraps(original)(functools.partial(rule, original))
            wrapped.rule_over = original
            setattr(_typehints, name, wrapped)
    # A text that jsonargparse would read as a number (a commit, 12e4567) is written in quotes, as
    # PyYAML does with those that its own loader would.
    for first, kinds in _loaders.get_yaml_default_loader().yaml_implicit_resolvers.items():
        for tag, pattern in kinds:
            if tag == "tag:yaml.org,2002:float":
                yaml.SafeDumper.add_implicit_resolver(tag, pattern, [first])


def _adapted(adapt: Callable[..., Any], val: Any, typehint: Any, *args: Any, **kwargs: Any) -> Any:
    """A value as its type; lists forget the earlier list, classes get flags as they were typed."""
    origin = _typehints.get_typehint_origin(typehint) or typehint
    is_collection = any(origin in kinds for kinds in _COLLECTIONS)
    typed = kwargs.get("orig_val")
    if isinstance(val, _typehints.NestedArg):
        if not is_collection and isinstance(typed, _typehints.NestedArg):
            val = typed
    elif is_collection and not kwargs.get("append"):
        kwargs = kwargs | {"prev_val": None}
    return adapt(val, typehint, *args, **kwargs)


def _discarded(discard: Callable[..., None], parser_or_action: Any, prev: Any, value: Any) -> None:
    """Drop the arguments that a new class does not have, as jsonargparse does, and say which.

    The new class has its own defaults: those of the old one, with which jsonargparse fills a class
    while it parses, are dropped first.
    """
    before = _arguments(prev)
    changed = before and prev["class_path"] != value["class_path"]
    defaults = _defaults(prev["class_path"]) if changed else {}
    if changed and defaults.keys() <= before.keys():
        for key in [key for key in defaults if _same(before[key], defaults[key])]:
            prev["init_args"].pop(key, None)
    discard(parser_or_action, prev, value)
    dropped = before.keys() - _arguments(prev).keys()
    chosen = [key for key in sorted(dropped) if not _same(before[key], defaults.get(key))]
    if chosen:
        old, new = (str(each["class_path"]).rpartition(".")[2] for each in (prev, value))
        given = ", ".join(f"{key}={before[key]}" for key in chosen)
        _say(f"{old} was replaced by {new}, which does not take its {given}: dropped")


def _arguments(spec: Any) -> dict[str, Any]:
    """Arguments of a class in a config, by their keys; empty where there are none."""
    if not _typehints.is_subclass_spec(spec) or not spec.get("init_args"):
        return {}
    return dict(
        _typehints.subclass_spec_as_namespace(spec).init_args.items(branches=True, nested=False)
    )


def _defaults(class_path: str) -> dict[str, Any]:
    """Defaults of the arguments of a class; empty if it cannot be imported."""
    try:
        parser = _typehints.ActionTypeHint.get_class_parser(class_path)
    except (ImportError, AttributeError, ValueError):
        return {}
    required = {action.dest for action in parser._actions if action.required}
    found = parser.get_defaults(skip_validation=True).items(branches=True, nested=False)
    return {key: value for key, value in found if key not in required}


def _same(left: Any, right: Any) -> bool:
    pair = [list(each) if isinstance(each, tuple) else each for each in (left, right)]
    return bool(pair[0] == pair[1])


@functools.cache  # a value is read several times while it is parsed
def _say(line: str) -> None:
    if is_first_process():
        print(f"note: {line}", file=sys.stderr)


# -- the order of flags and files

# Options whose value is a class, and where the configs are that name one.
CONFIGS = {"model": "configs/objective/", "data": "configs/data/"}
_CLASS_NAME = re.compile(r"(?!(?:null|true|false)$)[A-Za-z_][\w.]*")


def in_order(words: Sequence[str]) -> list[str]:
    """Words of a command in which each class is named before its arguments.

    A class that a later flag or file names is named first as well, so that what was given before it
    is checked against it and kept.

    Args:
        words: The verb, then flags.

    Raises:
        TemperError: arguments of a class are given, and nothing names the class.
    """
    verb, *flags = words or [""]
    ahead: list[str] = []
    file = os.environ.get(f"TEMPER_{verb}__CONFIG".upper())
    given = [f"--config={file}"] if file else []  # read before all flags
    for option in CONFIGS:
        mentions = list(_mentions([*given, *flags], option))
        chosen = next((name for name in mentions if name), None)
        if not mentions or mentions[0] or f"TEMPER_{verb}__{option}".upper() in os.environ:
            continue
        if chosen is None:
            raise TemperError(
                f"--{option}: its arguments are given, and no class to have them; give one with"
                f" --{option}=CLASS, or with a config before or after ({CONFIGS[option]})"
            )
        ahead.append(f"--{option}={chosen}")
    return [*words[:1], *ahead, *_nested_in_order(flags)]


def files_in(words: Sequence[str]) -> list[str]:
    """Config files of a command, the last one first."""
    return [value for key, value in _pairs(words[1:]) if key in ("config", "-c")][::-1]


def sets_root(words: Sequence[str]) -> bool:
    """Whether a flag of a command names the run folder."""
    return any(key == "trainer.default_root_dir" for key, _ in _pairs(words[1:]))


def _mentions(flags: Sequence[str], option: str) -> Iterator[str]:
    """For each flag and file that sets an option: the class that it names, empty for none."""
    for key, value in _pairs(flags):
        if key in ("config", "-c"):
            section = _section(value, option)
            if section:
                yield str(section.get("class_path", "")) if isinstance(section, dict) else section
        elif key in (option, f"{option}.class_path"):
            yield _class_in(value)
        elif key.startswith(f"{option}.") and not key.endswith(".help"):
            yield ""


def _class_in(value: str) -> str:
    """The class that the value of a flag names: alone, or as ``class_path`` of a mapping."""
    if _CLASS_NAME.fullmatch(value):
        return value
    try:
        content = yaml.safe_load(value)
    except yaml.YAMLError:
        return ""
    return str(content.get("class_path", "")) if isinstance(content, dict) else ""


def _section(path: str, option: str) -> Any:
    """What a config file says about an option; nothing if it cannot be read, as is said later."""
    try:
        with open(path, encoding="utf-8") as file:
            content = translated(yaml.safe_load(file))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return content.get(option) if isinstance(content, dict) else None


def _nested_in_order(flags: Sequence[str]) -> list[str]:
    """Flags in which ``--model.optimizer=SGD`` comes before ``--model.optimizer.momentum=0.9``."""
    groups = list(_groups(flags))
    for number, (key, value, words) in enumerate(groups):
        if key.partition(".")[0] not in CONFIGS or not _CLASS_NAME.fullmatch(value):
            continue
        first = next(
            (n for n, other in enumerate(groups[:number]) if other[0].startswith(f"{key}.")), None
        )
        named = any(other[0] == key for other in groups[:number])
        if first is not None and not named:
            groups.insert(first, (key, value, words))
            del groups[number + 1]
    return [word for _, _, words in groups for word in words]


def _pairs(flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    return ((key, value) for key, value, _ in _groups(flags))


def _groups(flags: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Every flag: its key (without ``init_args``), its value, and the words that it is made of."""
    rest = list(flags)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        words = [word]
        if not equals and word.startswith("-") and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
            words.append(value)
        yield name.removeprefix("--").replace(".init_args", ""), value, words
