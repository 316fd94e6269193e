"""A harmless payload for tests of refusals: small, but read by tests of several folders."""

from pathlib import Path


class Bomb:
    """Reading a pickle of it creates a file.

    Args:
        marker: The file.
    """

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)
