"""The checkpoints of a fit: they carry what they belong to, and ``last.ckpt`` is the last."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint

from temper.cli.checkpoints import LAST, SETTINGS
from temper.errors import TemperError
from temper.slurm import preempted_checkpoints

# Keys of a checkpoint, beside its settings.
TOKENIZER = "tokenizer_sha256"
DATA = "data_sha256"


class OwnCheckpoints(L.Callback):
    """Checkpoints that carry their settings, and a ``last.ckpt`` that is the last.

    A new fit in a run folder moves the checkpoints of the fit before it to ``earlier.<n>``; a
    resumed one goes on with them. Where `ModelCheckpoint` keeps ``last.ckpt``, it is written again
    after the last step if that has not been saved.

    Args:
        settings: `trained_settings` of the fit.
        resumed: The checkpoint that the fit resumes from, if it does.
    """

    def __init__(self, settings: dict[str, Any], resumed: str | None) -> None:
        self._settings = json.dumps(settings)
        self._resumed = resumed
        self._hashes: dict[str, Any] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move the checkpoints of an earlier fit away.

        Raises:
            TemperError: ``last.ckpt`` of an earlier fit is in a folder outside of the run folder,
                where nothing is moved.
        """
        run = Path(trainer.default_root_dir).resolve()
        if self._goes_on_in(run):
            return
        moved = list(preempted_checkpoints(run))
        source = None if self._resumed is None else Path(self._resumed).resolve().parent
        # The usual folder too where this fit saves nothing: an evaluation would take them for its.
        keeps_last = {(run / "checkpoints").resolve(): False}
        for callback in _savers(trainer):
            folder = Path(callback.dirpath).resolve()
            keeps_last[folder] = keeps_last.get(folder, False) or callback.save_last
        for folder, is_replaced in keeps_last.items():
            if folder == source:
                continue
            if folder.is_relative_to(run):
                moved += folder.glob(f"*{ModelCheckpoint.FILE_EXTENSION}")
            elif is_replaced and (folder / LAST).exists():
                raise TemperError(
                    f"ModelCheckpoint.dirpath={folder}: it has {LAST} of an earlier fit; move it"
                    " away, give another folder, or resume from it with --ckpt_path"
                )
        trainer.strategy.barrier("OwnCheckpoints: all ranks have looked")
        if trainer.is_global_zero and moved:
            _set_aside(sorted(set(moved)), run)
        trainer.strategy.barrier("OwnCheckpoints: moved")

    def _goes_on_in(self, run: Path) -> bool:
        """Whether the fit resumes from a checkpoint of the fit that was here."""
        if self._resumed is None or "://" in self._resumed:
            return False
        path = Path(self._resumed).resolve()
        return path.is_relative_to(run) and not path.relative_to(run).parts[0].startswith("earlier")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let a resumed fit replace ``last.ckpt``, also after its callback's settings changed.

        Rows are hashed now: a preempted job has no time for it.
        """
        self._hashes = self._hashes or _hashes(trainer)
        for callback in _savers(trainer):
            path = Path(callback.dirpath) / LAST
            if callback.save_last and not callback.last_model_path and path.exists():
                callback.last_model_path = str(path)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step where ``last.ckpt`` is of an earlier one."""
        for callback in _savers(trainer):
            if callback.save_last and not callback._should_skip_saving_checkpoint(trainer):
                chosen = callback.save_last
                callback.save_last = True  # a link would be to the checkpoint of an earlier step
                callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
                callback.save_last = chosen

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the settings, and hashes of the tokenizer and of the training rows."""
        if self._hashes is None:
            self._hashes = _hashes(trainer)
        checkpoint[SETTINGS] = self._settings
        checkpoint |= self._hashes

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Compare tokenizer and, for a fit, training rows.

        Raises:
            TemperError: they are not those of the checkpoint.
        """
        self._hashes = _hashes(trainer)
        wanted = {
            TOKENIZER: "tokenizer",
            **({DATA: "training rows"} if self._is_fit(trainer) else {}),
        }
        for key, what in wanted.items():
            then, now = checkpoint.get(key), self._hashes.get(key)
            if then is not None and now is not None and then != now:
                raise TemperError(
                    f"ckpt_path={trainer.ckpt_path}: the {what} of the checkpoint were others:"
                    f" {key}={_short(then)}, now {_short(now)}; give the files that it was trained"
                    " with, or start from its export (model.network.path)"
                )

    @staticmethod
    def _is_fit(trainer: L.Trainer) -> bool:
        return trainer.state.fn == "fit"


def _savers(trainer: L.Trainer) -> Iterator[Any]:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and "://" not in str(callback.dirpath):
            yield callback


def _set_aside(checkpoints: list[Path], run: Path) -> None:
    number = 1
    while os.path.lexists(run / f"earlier.{number}"):
        number += 1
    target = run / f"earlier.{number}"
    for path in checkpoints:
        moved = target / path.relative_to(run)
        moved.parent.mkdir(parents=True, exist_ok=True)
        path.rename(moved)
    print(f"checkpoints of the fit before this one were moved to {target}")


def _hashes(trainer: L.Trainer) -> dict[str, Any]:
    """Hashes of the tokenizer and of every stream of training rows, where the data have them."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    found: dict[str, Any] = {}
    backend = getattr(getattr(data, "tokenizer", None), "backend_tokenizer", None)
    if backend is not None:
        found[TOKENIZER] = hashlib.sha256(_plain_tokenizer(backend).encode()).hexdigest()
    if trainer.state.fn == "fit" and hasattr(data, "fingerprints"):
        rows = data.fingerprints()
        found[DATA] = {name: rows[name] for name in sorted(rows) if name != "eval"}
    return found


def _plain_tokenizer(backend: Any) -> str:
    """A tokenizer as text, without the padding and truncation that its last call left in it."""
    content = json.loads(backend.to_str())
    return json.dumps({k: v for k, v in content.items() if k not in ("padding", "truncation")})


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {str(each)[:12]}" for name, each in value.items())
    return str(value)[:12]
