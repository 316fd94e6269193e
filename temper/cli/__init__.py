"""The command line."""

from temper.cli.main import TemperCLI, main

__all__ = ["TemperCLI", "main"]
