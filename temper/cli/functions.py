"""Command lines made of plain functions: the signature is the flags, the docstring the help."""

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli

from temper.errors import TemperError, close_names

_UNKNOWN = re.compile(r"--([\w.\-]+)|[Oo]ption '([^']+)'")


class FunctionParser(ArgumentParser):
    """A parser without abbreviations, whose errors are one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"allow_abbrev": False}))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with status 2."""
        line = one_line(message)
        if unknown := _UNKNOWN.search(line):
            name = unknown.group(1) or unknown.group(2)
            close = close_names(name, [action.dest for action in self._actions])
            if close and close[0] != name:
                line += f"; did you mean --{close[0]}?"
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def run_functions(
    functions: Callable[..., Any] | Mapping[str, Callable[..., Any]],
    argv: list[str],
    prog: str,
    description: str,
) -> int:
    """Parse the words of a command and call the function that they name.

    Args:
        functions: One function, or several by the word that chooses them.
        argv: Words after ``prog``.
        prog: How the command is typed, for the help.
        description: What the command does, for the help.

    Returns:
        The exit status: 0, or 2 after a user's error, which is one line on standard error.
    """
    components: Any = functions
    try:
        auto_cli(
            components,
            as_positional=False,
            args=argv,
            parser_class=FunctionParser,
            prog=prog,
            description=description,
        )
    except TemperError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def one_line(message: str) -> str:
    """A message of jsonargparse, which indents over several lines, as one line."""
    return " ".join(part.strip(" -") for part in message.splitlines() if part.strip())
