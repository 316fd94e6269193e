"""The argument parser: no abbreviations, and a guess at what a wrong key meant."""

import difflib
import re
import sys
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser


class TemperParser(LightningArgumentParser):
    """LightningArgumentParser whose errors are short and end in a suggestion."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        print("RAW:", message, file=sys.stderr)
        sys.exit(2)
