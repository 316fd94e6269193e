"""Single-file checkpoints, written atomically: under a name there is always a complete one."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins import AsyncCheckpointIO

from temper.checkpoint_file import load_checkpoint, save_file
from temper.errors import TemperError
from temper.sharded_checkpoint import find_foreign_file, is_sharded, remove_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """As Lightning's, but a file is written next to its target and renamed when it is complete.

    Lightning collects the file in memory and moves it from the system's temporary folder, which may
    be on another file system: then the move is a copy, and a full disk replaces a complete
    checkpoint by half of one.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write the whole file or nothing; remote paths (``s3://...``) are left to Lightning.

        Raises:
            TemperError: it could not be written, or there is a folder of that name that is no
                checkpoint; what was there is unchanged.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        if target.is_symlink() or not target.is_dir():
            save_file(checkpoint, target)
            return
        if problem := find_foreign_file(target):  # otherwise sharded, of an earlier strategy
            raise TemperError(f"checkpoint {target}: a folder that {problem}; move it away")
        complete = target.with_name(f".{target.name}.new")
        save_file(checkpoint, complete)
        remove_checkpoint(target)
        os.replace(complete, target)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint of this run; what is no checkpoint stays, with a warning.

        A checkpoint that is resumed from gives ModelCheckpoint the names of older ones.
        """
        if "://" in str(path):
            super().remove_checkpoint(path)
            return
        if Path(path).suffix != ".ckpt" or ".." in Path(path).parts:
            warnings.warn(f"{path} is not deleted: no checkpoint's name", stacklevel=2)
            return
        try:
            remove_checkpoint(Path(path))
        except TemperError as error:
            warnings.warn(str(error), stacklevel=2)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file of tensors and plain values.

        Raises:
            TemperError: it is a sharded checkpoint, is damaged, holds more than tensors and plain
                values, or is not of a run.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, weights_only=True)
        if is_sharded(path):
            raise TemperError(
                f"ckpt_path={path}: a sharded checkpoint, as fsdp2 and zero write it, and"
                " trainer.strategy reads single files; resume with one of those (any number of"
                " ranks), or export it (train.py export) and start from that"
            )
        return load_checkpoint(Path(path))


class BackgroundCheckpointIO(AsyncCheckpointIO):
    """As `AtomicCheckpointIO`, but writes a copy in the background while training continues.

    For single-file checkpoints (one device, ddp). Removals are queued too: an old checkpoint is
    removed when the new one is complete. A failed write raises at the next save or at the end of
    training.
    """

    def __init__(self) -> None:
        self._atomic = AtomicCheckpointIO()
        super().__init__(self._atomic)

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """The atomic one; a strategy cannot replace it by Lightning's own."""
        return self._atomic

    @checkpoint_io.setter
    def checkpoint_io(self, other: CheckpointIO | None) -> None:
        pass

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file once all checkpoints that were queued before have been written."""
        self._ensure_setup()
        executor: ThreadPoolExecutor | None = self._executor
        assert executor is not None
        executor.submit(self._remove, path)

    def _remove(self, path: Any) -> None:
        if self._error is None:  # otherwise keep the older checkpoint
            self._atomic.remove_checkpoint(path)


def with_atomic_checkpoints(plugins: list[Any]) -> list[Any]:
    """The Trainer's plugins, with `AtomicCheckpointIO` added if they have no `CheckpointIO`."""
    if any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        return plugins
    return [*plugins, AtomicCheckpointIO()]
