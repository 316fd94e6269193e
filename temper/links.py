"""Symbolic links in model folders: which of them are followed, for models and tokenizers alike."""

import os
from pathlib import Path

from temper.errors import TemperError


def check_links(folder: Path, where: str) -> None:
    """Check that no link in a model folder leads out of it; the folder itself may be a link.

    A snapshot in the hub's cache consists of links to the blobs of its model, which are followed.

    Args:
        folder: Any folder.
        where: Flag and folder, for errors.

    Raises:
        TemperError: names the first link that leads elsewhere.
    """
    real = folder.resolve()
    inside = [real]
    if real.parent.name == "snapshots" and real.parents[1].name.startswith("models--"):
        inside.append(real.parents[1] / "blobs")
    for place, folders, files in os.walk(real):
        for entry in (Path(place) / name for name in (*folders, *files)):
            if entry.is_symlink():
                target = Path(os.path.realpath(entry))
                if not any(target.is_relative_to(root) for root in inside):
                    raise TemperError(
                        f"{where}: {entry.relative_to(real)} is a symbolic link to {target}, out of"
                        " the folder, and is not followed; put a copy of the file there"
                    )
