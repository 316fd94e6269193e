"""Combine the weights of existing models: interpolate, remove-harm, undo."""

from collections.abc import Callable

from temper.cli.functions import run_functions
from temper.edit.folders import interpolate
from temper.edit.harm import remove_harm, undo

FUNCTIONS: dict[str, Callable[..., None]] = {
    "interpolate": interpolate,
    "remove-harm": remove_harm,
    "undo": undo,
}


def main(argv: list[str]) -> int:
    """Run one of `FUNCTIONS`; returns the exit status."""
    return run_functions(FUNCTIONS, argv, prog="temper edit", description=__doc__ or "")
