"""Leave a Hugging Face folder behind."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L

from strategies import whole_network
from temper.errors import TemperError
from temper.models.export import Dtype, export_module
from temper.models.lora import base_model_name, is_adapted


class HFExport(L.Callback):
    """Save network, tokenizer and model card when training ends, for the next stage or any other
    tool.

    Args:
        folder: Target; relative paths are inside the run folder.
        merge: Merge LoRA weights into the base; otherwise an adapter-only folder is written.
        dtype: Precision of the weights that are written; null: that of the network. A 16-bit base
            to which an adapter was added is rounded, which the card and a warning put a figure on;
            float32 keeps the sum. Adapters alone are always float32.
    """

    def __init__(
        self, folder: str = "export", merge: bool = True, dtype: Dtype | None = None
    ) -> None:
        self.folder, self.merge, self.dtype = folder, merge, dtype

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse, before training, an adapter-only export whose base is in no folder.

        Raises:
            TemperError: ``merge`` is off, and the base is of random weights or has an adapter
                merged into it.
        """
        network: Any = pl_module.network
        if not self.merge and is_adapted(network) and not base_model_name(network):
            raise TemperError(
                "HFExport.merge=false: an adapter needs a base folder to be loaded on, and this"
                " one's is in none (network.shape, or network.adapter=merge); set merge to true, or"
                " export the base first and give network.path"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export on the first rank; the others wait."""
        network = whole_network(trainer, pl_module)
        if trainer.is_global_zero:
            run, data = Path(trainer.default_root_dir), trainer.datamodule  # type: ignore[attr-defined]
            export_module(
                pl_module,
                data,
                run / self.folder,
                self.merge,
                run,
                trainer.global_step,
                network,
                self.dtype,
            )
        trainer.strategy.barrier("HFExport")
