"""``python -m temper.edit {interpolate,remove-harm,undo} --flag value``: arithmetic between model
folders.
"""

import re
import sys
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli

from temper.edit.folders import interpolate
from temper.edit.harm import remove_harm, undo
from temper.errors import TemperError, close_names

VERBS: Any = {"interpolate": interpolate, "remove-harm": remove_harm, "undo": undo}


class EditParser(ArgumentParser):
    """A parser without abbreviations, whose errors are one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"allow_abbrev": False}))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and leave with status 2."""
        line = " ".join(part.strip(" -") for part in message.splitlines() if part.strip())
        if unknown := re.search(r"--([\w.\-]+)|[Oo]ption '([^']+)'", line):
            name = unknown.group(1) or unknown.group(2)
            close = close_names(name, [action.dest for action in self._actions])
            if close and close[0] != name:
                line += f"; did you mean --{close[0]}?"
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def main(args: list[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line on standard error and exit status 2."""
    try:
        auto_cli(
            VERBS,
            as_positional=False,
            args=args,
            parser_class=EditParser,
            prog="python -m temper.edit",
            description=__doc__,
        )
    except TemperError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
