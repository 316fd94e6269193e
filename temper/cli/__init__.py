"""The command line."""

from temper.cli.checkpoint_io import AtomicCheckpointIO, BackgroundCheckpointIO
from temper.cli.main import TemperCLI, main

__all__ = ["AtomicCheckpointIO", "BackgroundCheckpointIO", "TemperCLI", "main"]
