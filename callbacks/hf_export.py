"""Leave a Hugging Face folder behind."""

from pathlib import Path

import lightning.pytorch as L

from temper.errors import TemperError
from temper.models import export_network


class HFExport(L.Callback):
    """Save network and tokenizer when training ends, for the next stage or any other tool.

    Args:
        folder: Target; relative paths are inside the run folder.
        merge: Merge LoRA weights into the base; otherwise an adapter-only folder is written.
    """

    def __init__(self, folder: str = "export", merge: bool = True) -> None:
        self.folder, self.merge = folder, merge

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse, before training, an adapter-only export whose base is no folder.

        Raises:
            TemperError: ``merge`` is off and the network was built from a shape.
        """
        spec = getattr(pl_module, "network_spec", None)
        if not self.merge and spec is not None and spec.lora is not None and spec.path is None:
            raise TemperError(
                "HFExport.merge=false with model.init_args.network.shape: an adapter needs a base folder to be loaded on; "
                "set merge to true, or export the base first and give network.path"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export on the first rank; the others wait."""
        if trainer.is_global_zero:
            target = Path(trainer.default_root_dir) / self.folder
            export_network(pl_module.network, trainer.datamodule.tokenizer, target, self.merge)  # type: ignore[arg-type,attr-defined]
        trainer.strategy.barrier("HFExport")
