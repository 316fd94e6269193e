"""Export of the trained network to a Hugging Face folder."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L

from callbacks.evaluation import data_of
from strategies import whole_network
from temper.errors import TemperError
from temper.models.export import Dtype, export_module
from temper.models.lora import base_model_name, is_adapted


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
        """Refuse, before training, an export of an adapter whose base model is in no folder.

        Raises:
            TemperError: ``merge`` is false, and the base model has random weights or an adapter
                merged into it.
        """
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
            )
        trainer.strategy.barrier("HFExport")
