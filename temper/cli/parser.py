"""From the words of a command to its config: errors that suggest a name, old names translated, and
the tokenizer that follows from the model.
"""

import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as L
from jsonargparse import get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser
from yaml import YAMLError

from temper.cli.functions import one_line
from temper.cli.merging import apply_rules
from temper.cli.renamed import moved_class, moved_config, moved_option, translated
from temper.errors import TemperError, close_names, did_you_mean
from temper.models.folder import NetworkSpec, tokenizer_folder

# What jsonargparse says about a name it does not know; the group is the name.
_UNKNOWN = (
    re.compile(r"unrecognized arguments: --([\w.\-]+)"),
    re.compile(r"Group '[^']+' does not accept option '([^']+)'"),
    re.compile(r"Subcommand '[^']+' does not accept option '([^']+)'"),
    re.compile(r"Option '([^']+)' is not accepted"),
    re.compile(r"Expected a dot import path string: (\S+)"),
    re.compile(r"invalid choice: '([^']+)'"),
    re.compile(r"\"config\": File does not exist: '([^']+)'"),
)
_CLASS_PATH = re.compile(r"class_path '([^']+)'")
# What jsonargparse says about a value of another type, and about a class that is none.
_WRONG_VALUE = re.compile(
    r"Parser key \"(?P<key>[^\"]+)\":(?P<errors>(?:(?!Parser key).)*?)"
    r"(?:\. Got value|Given value type: \S+ '[^']*'> Given value): (?P<value>.*)"
)
_EXPECTED = re.compile(
    r"Expected a (?:<class '(?P<kind>[^']+)'>|typing\.Literal\[(?P<words>[^\]]+)\])"
)
_KINDS = {
    "NoneType": "null",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "list": "a list",
}
_NO_CLASS = re.compile(
    r"class_path '([\w.]+)': (?:module '[\w.]+' has no attribute|No module named)"
)
_OTHER_CLASS = re.compile(
    r"Import path (\S+) does not (?:implement protocol|correspond to a subclass of) (\w+)"
)
_load_yaml = get_loader("yaml")
MODE = "temper"  # YAML in which class paths of earlier versions are translated


def _load(text: str) -> Any:
    value = _load_yaml(text)
    # A single word is a flag's value, which jsonargparse takes from the command line itself.
    return translated(value) if isinstance(value, dict | list) else value


set_loader(MODE, _load, exceptions=(YAMLError,))
apply_rules()


class TemperParser(LightningArgumentParser):
    """LightningArgumentParser whose errors are one line and end in a suggestion."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: Names of the classes whose arguments are options of this parser. Each class that a config
        #: names has a parser of its own.
        self.classes: list[str] = []
        super().__init__(*args, **(kwargs | {"allow_abbrev": False, "parser_mode": MODE}))

    def add_class_arguments(self, class_type: Any, *args: Any, **kwargs: Any) -> list[str]:
        """As in jsonargparse; keeps the name of the class for errors."""
        self.classes.append(getattr(class_type, "__name__", str(class_type)))
        added: list[str] = super().add_class_arguments(class_type, *args, **kwargs)
        return added

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with status 2."""
        names = [match.group(1) for pattern in _UNKNOWN if (match := pattern.search(message))]
        line = one_line(message)
        moved = [new for path in _CLASS_PATH.findall(message) if (new := moved_class(path))]
        if moved:
            line = moved[0]
        elif names:
            line = self._explain(names[0], line)
        else:
            line = _readable(line)
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)

    def _explain(self, name: str, message: str) -> str:
        if "File does not exist" in message:
            return _missing_config(os.path.relpath(name))
        if moved := moved_option(name, self.classes):
            return moved
        close = suggest(name, {*self._known_flags(), *_known_names()})
        hint = f"see {self.prog.split(' [')[0]} --help"
        if close:
            hint = f"did you mean {' or '.join(map(repr, close))}?"
        if "import path" in message:
            return f"no class is named {name!r}; {hint}"
        if "invalid choice" in message:
            return f"{message}; {hint}"
        if name in close:
            return f"option {name!r} is known, but not to what was chosen here: {message}"
        return f"unknown option {name!r}; {hint} (names are not abbreviated)"

    def known_variables(self, prefix: str) -> set[str]:
        """Environment variables that options read, such as ``TEMPER_FIT__TRAINER__MAX_STEPS``."""
        names = {action.dest for action in self._actions}
        if self._subcommands_action:
            for verb, parser in self._subcommands_action._name_parser_map.items():
                names |= {f"{verb}.{action.dest}" for action in parser._actions}
        return {f"{prefix}_{name.replace('.', '__')}".upper() for name in names}

    def _known_flags(self) -> Iterator[str]:
        for action in self._actions:
            yield action.dest
        if self._subcommands_action:
            for name, parser in self._subcommands_action._name_parser_map.items():
                yield name
                yield from parser._known_flags()


# -- suggestions


def suggest(name: str, known: Iterable[str]) -> list[str]:
    """Up to two known names close to a wrong one: as a whole, or by its last part."""
    known = set(known)
    last = name.rsplit(".", 1)[-1]
    return close_names(name, known, 2, 0.75) or close_names(
        last, (k for k in known if "." not in k), 2, 0.7
    )


def _readable(line: str) -> str:
    """A message about a value, in the words of a config rather than of Python's types."""
    if missing := _NO_CLASS.search(line):
        path = missing[1]
        return (
            f"no class is named {path!r}; {did_you_mean(path, _neighbours(path), 'see the docs')}"
        )
    if other := _OTHER_CLASS.search(line):
        return f"class {other[1]!r} is no {other[2]}, and one is needed there; give another class"
    found = list(_WRONG_VALUE.finditer(line))
    if not found:
        return line
    key, errors, value = found[-1]["key"], found[-1]["errors"], found[-1]["value"]
    if "instantiatable class" in errors:
        return f"{key}={value}: give a class as class_path, and its arguments under init_args"
    accepted = [
        _KINDS.get(match["kind"], match["kind"]) or match["words"].replace("'", "")
        for match in _EXPECTED.finditer(errors)
    ]
    if not accepted or "Problem with" in errors:
        return line
    shown = "null" if value == "None" else value
    return f"{key}={shown}: give {' or '.join(dict.fromkeys(accepted))}"


def _neighbours(path: str) -> Iterator[str]:
    """Import paths of the classes in the module of a class that it does not have."""
    module = path.rpartition(".")[0]
    for name, value in vars(sys.modules.get(module, object)).items():
        if isinstance(value, type):
            yield f"{module}.{name}"


def _missing_config(path: str) -> str:
    """The error of a config file that does not exist."""
    if moved := moved_config(path):
        return f"--config={path}: {moved}"
    known = map(str, Path("configs").rglob("*.yaml"))
    return f"--config={path}: no such file; {did_you_mean(path, known, 'see configs/')}"


def _known_names() -> Iterator[str]:
    """Our own module, data and callback classes, their arguments, and the fields of those."""
    for base in (L.LightningModule, L.LightningDataModule, L.Callback):
        for kind in _subclasses(base):
            yield kind.__name__
            for parameter in inspect.signature(kind).parameters.values():
                yield parameter.name
                yield from _fields(parameter.annotation)


def _subclasses(base: type) -> Iterator[type]:
    kind: type
    for kind in base.__subclasses__():
        if not kind.__module__.startswith("lightning."):
            yield kind
        yield from _subclasses(kind)


def _fields(annotation: Any) -> Iterator[str]:
    kind: Any
    for kind in (annotation, *getattr(annotation, "__args__", ())):
        if dataclasses.is_dataclass(kind):
            for field in dataclasses.fields(kind):
                yield field.name
                yield from _fields(field.type)


# -- the tokenizer that follows from the model


def fill_tokenizer(config: Any) -> None:
    """Set ``data.init_args.tokenizer`` to the folder of the model's tokenizer where it is null, and
    trust it as the model is trusted.

    An adapter folder without a tokenizer stands for its base model. `StoredAnswers` has no network,
    but may name a tokenizer. Data without such an argument bring their own tokenizer.

    Args:
        config: The verb's config, changed in place.

    Raises:
        TemperError: the network is built from a shape, so there is no tokenizer to take; or its
            folder has none.
    """
    arguments = config.data.get("init_args") or {}
    if "tokenizer" not in arguments or arguments["tokenizer"] is not None:
        return
    model = config.model.get("init_args") or {}
    if model.get("tokenizer"):  # answers in place of a model: there is no network to take it from
        arguments["tokenizer"] = model["tokenizer"]
        return
    network = model.get("network") or {}
    if network.get("path") is None:
        raise TemperError(
            "data.init_args.tokenizer is not set, and"
            f" data={config.data.class_path.rpartition('.')[2]} needs one: the network has no"
            " folder to take it from (model.init_args.network.path); give a folder with"
            " tokenizer.json"
        )
    names = ("path", "revision", "local_files_only", "trust_remote_code")
    spec = NetworkSpec(**{name: network[name] for name in names})
    arguments["tokenizer"] = str(tokenizer_folder(spec))
    if arguments.get("trust_remote_code", False) is None:
        arguments["trust_remote_code"] = spec.trust_remote_code
