"""The argument parser: no abbreviations, and a guess at what a wrong name meant."""

import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as L
from lightning.pytorch.cli import LightningArgumentParser

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


class TemperParser(LightningArgumentParser):
    """LightningArgumentParser whose errors are one line and end in a suggestion."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and leave with status 2."""
        names = [match.group(1) for pattern in _UNKNOWN if (match := pattern.search(message))]
        line = " ".join(part.strip(" -") for part in message.splitlines() if part.strip())
        if names:
            line = self._explain(names[0], line)
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)

    def _explain(self, name: str, message: str) -> str:
        if "File does not exist" in message:
            known = map(str, Path("configs").rglob("*.yaml"))
            hint = did_you_mean(os.path.relpath(name), known, "see configs/")
            return f"--config={os.path.relpath(name)}: no such file; {hint}"
        close = suggest(name, {*self._known_flags(), *_known_names()})
        hint = (
            f"did you mean {' or '.join(map(repr, close))}?"
            if close
            else f"see {self.prog.split(' [')[0]} --help"
        )
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


def suggest(name: str, known: Iterable[str]) -> list[str]:
    """Up to two known names close to a wrong one: as a whole, or by its last part."""
    known = set(known)
    last = name.rsplit(".", 1)[-1]
    return close_names(name, known, 2, 0.75) or close_names(
        last, (k for k in known if "." not in k), 2, 0.7
    )


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


# MERGED from temper.cli.parser: Data that need a tokenizer take the model's, unless they are given
# another.


def fill_tokenizer(config: Any) -> None:
    """Set ``data.init_args.tokenizer`` to the folder of the model's tokenizer where it is null, and
    trust it as the model is trusted.

    An adapter folder without a tokenizer stands for its base. Data without such an argument bring
    their own.

    Args:
        config: The verb's config, changed in place.

    Raises:
        TemperError: the network is built from a shape, so there is no tokenizer to take; or its
            folder has none.
    """
    arguments = config.data.get("init_args") or {}
    if "tokenizer" not in arguments or arguments["tokenizer"] is not None:
        return
    network = (config.model.get("init_args") or {}).get("network") or {}
    if network.get("path") is None:
        raise TemperError(
            "data.init_args.tokenizer is not set, and"
            f" data={config.data.class_path.rpartition('.')[2]} needs one: the network has no"
            " folder to take it from (model.init_args.network.path); give a folder with"
            " tokenizer.json"
        )
    spec = NetworkSpec(
        **{
            name: network[name]
            for name in ("path", "revision", "local_files_only", "trust_remote_code")
        }
    )
    arguments["tokenizer"] = str(tokenizer_folder(spec))
    if arguments.get("trust_remote_code", False) is None:
        arguments["trust_remote_code"] = spec.trust_remote_code
