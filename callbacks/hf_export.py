"""Export of the trained network to a Hugging Face folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from callbacks.evaluation import data_of
from strategies import whole_network
from temper.errors import TemperError
from temper.models.export import WRITER, Dtype, export_module
from temper.models.lora import base_model_name, is_adapted
from temper.output_folder import check_target, resolve_target

FOLDER_FLAG = "HFExport.folder"
RUN_SUFFIXES = (".json", ".jsonl", ".yaml", ".csv", ".diff", ".ckpt")  # of a run folder's files


class HFExport(L.Callback):
    """Export network, tokenizer and model card when training ends, for the next stage or any other
    tool.

    Args:
        folder: Target; relative paths are inside the run folder.
        merge: Whether LoRA weights are merged into the base model; otherwise the folder holds the
            adapter alone.
        dtype: Precision of the written weights; null: that of the network. Merging an adapter into
            a 16-bit base model rounds the weights, and the card and a warning say by how much;
            float32 keeps the sum. Adapters alone are always float32.
    """

    def __init__(
        self, folder: str = "export", merge: bool = True, dtype: Dtype | None = None
    ) -> None:
        self.folder = folder
        self.merge = merge
        self.dtype: Dtype | None = dtype

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse, before training, an export that could not be written after it.

        Raises:
            TemperError: ``merge`` is false, and the base model is in no folder: it has random
                weights, or an adapter merged into it. Or ``folder`` is the run folder or another
                callback's, leaves the run folder, or holds files that Temper did not write.
        """
        check_target(self._target(trainer), FOLDER_FLAG, WRITER)
        network: Any = pl_module.network
        if not self.merge and is_adapted(network) and not base_model_name(network):
            raise TemperError(
                "HFExport.merge=false: an adapter is loaded on the folder of its base model, and"
                " this base model is in none (network.shape, or network.adapter=merge); set merge"
                " to true, or export the base model first and give network.path"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export on the first rank; the others wait."""
        network = whole_network(trainer, pl_module)
        if trainer.is_global_zero:
            run = Path(trainer.default_root_dir)
            export_module(
                pl_module,
                data_of(trainer),
                run / self.folder,
                self.merge,
                run,
                trainer.global_step,
                network,
                self.dtype,
                FOLDER_FLAG,
            )
        trainer.strategy.barrier("HFExport")

    def _target(self, trainer: L.Trainer) -> Path:
        """The folder to write.

        Raises:
            TemperError: it is no folder of its own in the run folder, or elsewhere.
        """
        run = Path(trainer.default_root_dir).resolve()
        target = resolve_target(run / self.folder, FOLDER_FLAG)
        if ".." in Path(self.folder).parts or target == run or target in run.parents:
            raise TemperError(
                f"{FOLDER_FLAG}={self.folder}: not inside the run folder; give a name such as"
                " export, or the absolute path of a folder elsewhere"
            )
        for other, owner in self._other_folders(trainer, run):
            if target == other or target in other.parents or other in target.parents:
                raise TemperError(
                    f"{FOLDER_FLAG}={self.folder}: {owner} writes to {other}; give a folder of its"
                    " own, such as export"
                )
        name = target.relative_to(run).parts[0] if run in target.parents else ""
        if Path(name).suffix in RUN_SUFFIXES or name.startswith("."):
            raise TemperError(
                f"{FOLDER_FLAG}={self.folder}: named like the files that a run writes; give a name"
                " such as export"
            )
        return target

    def _other_folders(self, trainer: L.Trainer, run: Path) -> Iterator[tuple[Path, str]]:
        """Folders that other callbacks and the loggers of the run write to, with their names."""
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            folder: Any = getattr(other, "dirpath", None)
            if isinstance(other, HFExport) and other is not self:
                folder = run / other.folder
            if folder is not None and "://" not in str(folder):
                yield Path(folder).resolve(), type(other).__name__
        for logger in trainer.loggers:
            if logger.log_dir and Path(logger.log_dir).resolve() != run:
                yield Path(logger.log_dir).resolve(), type(logger).__name__
