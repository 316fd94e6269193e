"""Export of the trained network to a Hugging Face folder."""

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from callbacks.evaluation import data_of
from strategies import whole_network
from temper.errors import TemperError
from temper.models.export import WRITER, Dtype, check_savable
from temper.models.export_check import MAX_KL
from temper.models.folder import first_line
from temper.models.lora import base_model_name, is_adapted
from temper.models.run_export import ExportSettings, export_module, keep_adapter
from temper.output_folder import check_target, resolve_target
from temper.run_folder import UNEXPORTED

FOLDER_FLAG = "HFExport.folder"
ADAPTER_FLAG = "HFExport.adapter"
# Of the files that a run or a study's stage writes into the run folder.
RUN_SUFFIXES = (".json", ".jsonl", ".yaml", ".csv", ".diff", ".ckpt", ".txt")
# Folders in it: of checkpoints, of those of earlier fits (earlier.<n>), and of evaluations.
RUN_FOLDERS = ("checkpoints", "earlier", "validate", "test", "predict")


class HFExport(L.Callback):
    """Export network, tokenizer and model card when training ends, for the next stage or any other
    tool.

    A run with adapters keeps the trained adapter in a folder of its own, whatever is exported, and
    writes it first. The written folder is loaded again and its greedy answers are compared with
    those of the trained network; the card says what was found. An export that fails ends the run
    with an error, and leaves the adapter, a checkpoint, and the command that exports again.

    Args:
        folder: Target; relative paths are inside the run folder.
        merge: Merge LoRA weights into the base model (true), or export the adapter alone (false).
            null merges where that keeps what was learned: in float32; in the precision of a 16-bit
            base, or into a dequantized 4- or 8-bit one, if the mean KL divergence along the trained
            network's answers is at most ``max_kl`` and less than a tenth of what was learned is
            lost. Otherwise the adapter alone is exported, or, where the base model is in no folder,
            the merge in float32.
        dtype: Precision of the written weights; null: that of the network. float32 keeps what a
            merge into a 16-bit base would round. Adapters alone are always float32.
        adapter: Folder of the trained adapter, as `folder`.
        check: Compare the answers; false: nothing is checked, and null does not merge what rounds.
        max_kl: Largest mean KL divergence, in nats per token, of an export that rounds weights.
    """

    def __init__(
        self,
        folder: str = "export",
        merge: bool | None = None,
        dtype: Dtype | None = None,
        adapter: str = "adapter",
        check: bool = True,
        max_kl: float = MAX_KL,
    ) -> None:
        if folder == adapter:
            raise TemperError(
                f"{ADAPTER_FLAG}={adapter}: the export goes there; give another name, such as"
                " adapter"
            )
        self.folder = folder
        self.adapter = adapter
        self.settings = ExportSettings(merge, dtype, check, max_kl)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse, before training, an export that could not be written after it.

        Raises:
            TemperError: ``merge`` is false, and the base model is in no folder: it has random
                weights, or an adapter merged into it. Or a target is the run folder or another
                callback's, leaves the run folder, or holds files that Temper did not write. Or
                config, tokenizer or adapter cannot be saved.
        """
        network: Any = pl_module.network
        for target, flag in self._targets(trainer, is_adapted(network)):
            check_target(target, flag, WRITER)
        if self.settings.merge is False and is_adapted(network) and not base_model_name(network):
            raise TemperError(
                "HFExport.merge=false: an adapter is loaded on the folder of its base model, and"
                " this base model is in none (network.shape, or network.adapter=merge); set merge"
                " to null or true, or export the base model first and give network.path"
            )
        data = data_of(trainer)
        check_savable(network, data.tokenizer, getattr(data, "stop_ids", None))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export on the first rank; the others wait.

        Raises:
            TemperError: the export failed; the message says what was kept, and how to export again.
        """
        problem: str | None = None
        cause: Exception | None = None
        try:
            network = whole_network(trainer, pl_module)  # may build the base model again
            if trainer.is_global_zero:
                self._export(trainer, pl_module, network)
        except Exception as error:  # whatever it is, the run must not be lost
            cause = error
            problem = str(error) if isinstance(error, TemperError) else _named(error)
        problem = trainer.strategy.broadcast(problem)  # that of the first rank, which writes
        if problem is None:
            return
        kept = self._keep_checkpoint(trainer)
        raise TemperError(f"{problem}; {self._what_is_left(trainer, pl_module, kept)}") from cause

    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule, network: Any) -> None:
        run = Path(trainer.default_root_dir)
        if is_adapted(network) and self._keeps_adapter(trainer):
            spec = getattr(pl_module, "network_spec", None)
            keep_adapter(network, run / self.adapter, spec, ADAPTER_FLAG)
        export_module(
            pl_module,
            data_of(trainer),
            run / self.folder,
            self.settings,
            run,
            trainer.global_step,
            network,
            trainer.strategy.root_device,  # Lightning has moved the network to the host
            FOLDER_FLAG,
        )

    # -- what is left when an export has failed

    def _keep_checkpoint(self, trainer: L.Trainer) -> Path | str:
        """A checkpoint of the last step, written if there is none; or why there is none. All ranks
        call it.
        """
        # One answer for all ranks: saving is collective, and disks may be those of one machine.
        saved: Path | None = trainer.strategy.broadcast(self._saved_checkpoint(trainer))
        if saved is not None:
            return saved
        path = Path(trainer.default_root_dir) / "checkpoints" / UNEXPORTED
        try:
            trainer.save_checkpoint(path, weights_only=False)
            trainer.strategy.checkpoint_io.teardown()  # waits for saving in the background
        except Exception as error:  # a full disk, most likely: the message says it
            return f"no checkpoint could be written ({_named(error)})"
        return path

    @staticmethod
    def _saved_checkpoint(trainer: L.Trainer) -> Path | None:
        """A checkpoint of the last step; None if there is none on this machine."""
        for callback in trainer.checkpoint_callbacks:
            last = Path(getattr(callback, "_last_checkpoint_saved", ""))
            saved_at = getattr(callback, "_last_global_step_saved", None)
            if saved_at == trainer.global_step and last.name and last.exists():
                return last
        return None

    def _what_is_left(
        self, trainer: L.Trainer, pl_module: L.LightningModule, kept: Path | str
    ) -> str:
        """What was kept of the run, and the command that exports it again."""
        run = Path(trainer.default_root_dir)
        adapter = run / self.adapter
        left = []
        network: Any = pl_module.network
        if is_adapted(network) and (adapter / "adapter_config.json").exists():
            left.append(f"the adapter is in {adapter}")
        if isinstance(kept, str):
            return "; ".join([*left, kept])
        words = ["temper", "export", "--config", run / "config.yaml", "--ckpt_path", kept]
        words += ["--folder", run / self.folder, *self._as_flags()]
        command = shlex.join(map(str, words))
        return "; ".join([*left, f"the checkpoint is {kept}; export again: {command}"])

    def _as_flags(self) -> Iterator[str]:
        """The settings that are not the defaults, as flags of ``temper export``."""
        plain = ExportSettings()
        for field in dataclasses.fields(plain):
            value = getattr(self.settings, field.name)
            if value != getattr(plain, field.name):
                yield f"--{field.name}={str(value).lower() if isinstance(value, bool) else value}"

    # -- targets

    def _keeps_adapter(self, trainer: L.Trainer) -> bool:
        """Whether this is the first export of the run that keeps the adapter in its folder."""
        exports = [one for one in trainer.callbacks if isinstance(one, HFExport)]  # type: ignore[attr-defined]
        return next(one for one in exports if one.adapter == self.adapter) is self

    def _targets(self, trainer: L.Trainer, adapted: bool) -> Iterator[tuple[Path, str]]:
        """Folders to write, and the options that give them.

        Raises:
            TemperError: as `_target`.
        """
        yield self._target(trainer, self.folder, FOLDER_FLAG), FOLDER_FLAG
        if adapted and self._keeps_adapter(trainer):
            yield self._target(trainer, self.adapter, ADAPTER_FLAG), ADAPTER_FLAG

    def _target(self, trainer: L.Trainer, name: str, flag: str) -> Path:
        """A folder to write.

        Raises:
            TemperError: it is no folder of its own in the run folder, or elsewhere.
        """
        run = Path(trainer.default_root_dir).resolve()
        target = resolve_target(run / name, flag)
        if ".." in Path(name).parts or target == run or target in run.parents:
            raise TemperError(
                f"{flag}={name}: not inside the run folder; give a name such as export, or the"
                " absolute path of a folder elsewhere"
            )
        for other, owner in self._other_folders(trainer, run, name):
            if target == other or target in other.parents or other in target.parents:
                raise TemperError(
                    f"{flag}={name}: {owner} writes to {other}; give a folder of its own, such as"
                    " export"
                )
        first = target.relative_to(run).parts[0] if run in target.parents else ""
        stem, _, ending = first.partition(".")
        own = stem in RUN_FOLDERS and (not ending or ending.isdecimal())
        if own or Path(first).suffix in RUN_SUFFIXES or (not stem and first):
            raise TemperError(
                f"{flag}={name}: named like what a run writes; give a name such as export"
            )
        return target

    def _other_folders(
        self, trainer: L.Trainer, run: Path, name: str
    ) -> Iterator[tuple[Path, str]]:
        """Folders that the run writes beside the one of this name, with who writes them; but not
        the run folder and those around it.
        """
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for other in (*callbacks, *trainer.loggers):
            own: Any = getattr(other, "dirpath", None) or getattr(other, "log_dir", None)
            folders = [own]
            if isinstance(other, HFExport):
                shared = other.adapter == name == self.adapter  # written once
                names = [other.folder, *([] if shared else [other.adapter])]
                folders = [run / one for one in names if other is not self or one != name]
            for folder in folders:
                if folder is None or "://" in str(folder):
                    continue
                place = Path(folder).resolve()
                if place != run and place not in run.parents:
                    yield place, type(other).__name__


def _named(error: Exception) -> str:
    """An error that is no `TemperError`, in one line."""
    return f"HFExport: {type(error).__name__}: {first_line(error)}"
