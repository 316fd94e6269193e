"""Checkpoints in one file, written so that there is always a complete one under the name."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins import AsyncCheckpointIO

from temper.errors import TemperError
from temper.sharded_checkpoint import is_in_parts, load_file, save_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """As Lightning's, but a file is written beside its place and moved there when it is on the
    disk.

    Lightning's collects the file in memory and moves it from the system's temporary folder, which
    may be another file system: then the move is a copy, and a full disk leaves half of a checkpoint
    where a whole one was.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write the whole file or nothing; paths that are no local ones go Lightning's way.

        Raises:
            TemperError: it could not be written; an earlier file of that name is as it was.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        save_file(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file of tensors and plain values.

        Raises:
            TemperError: it is a checkpoint in parts, damaged, or holds more than tensors and plain
                values.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, weights_only=True)
        if is_in_parts(path):
            raise TemperError(
                f"ckpt_path={path}: a checkpoint in parts, of fsdp2 or zero, and trainer.strategy"
                " reads single files; resume with one of those (any number of ranks), or export it"
                " (train.py export) and start from that"
            )
        content: dict[str, Any] = load_file(Path(path))
        return content


class BackgroundCheckpointIO(AsyncCheckpointIO):
    """Checkpoints are copied in memory, and written as `AtomicCheckpointIO` does while training
    goes on.

    For checkpoints in one file (one device, ddp). Removals wait their turn: an old checkpoint goes
    when the new one is there. What could not be written is an error of the next save, or of the end
    of training.
    """

    def __init__(self) -> None:
        self._atomic = AtomicCheckpointIO()
        super().__init__(self._atomic)

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """Always the atomic one: a strategy would put Lightning's own in its place."""
        return self._atomic

    @checkpoint_io.setter
    def checkpoint_io(self, other: CheckpointIO | None) -> None:
        pass

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file once what was asked for before has been written."""
        self._ensure_setup()
        executor: ThreadPoolExecutor | None = self._executor
        assert executor is not None
        executor.submit(self._remove, path)

    def _remove(self, path: Any) -> None:
        if self._error is None:  # else the older checkpoint is the one that is left
            self._atomic.remove_checkpoint(path)


def with_atomic_checkpoints(plugins: list[Any]) -> list[Any]:
    """The Trainer's plugins, with `AtomicCheckpointIO` where no other way of writing checkpoints
    was chosen.
    """
    if any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        return plugins
    return [*plugins, AtomicCheckpointIO()]
