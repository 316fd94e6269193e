"""Leave a Hugging Face folder behind."""

from pathlib import Path

import lightning.pytorch as L

from temper.models import export_network


class HFExport(L.Callback):
    """Save network and tokenizer when training ends, for the next stage or any other tool.

    Args:
        folder: Target; relative paths are inside the run folder.
        merge: Merge LoRA weights into the base; otherwise an adapter-only folder is written.
    """

    def __init__(self, folder: str = "export", merge: bool = True) -> None:
        self.folder, self.merge = folder, merge

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export on the first rank; the others wait."""
        if trainer.is_global_zero:
            target = Path(trainer.log_dir or trainer.default_root_dir) / self.folder
            export_network(pl_module.network, trainer.datamodule.tokenizer, target, self.merge)  # type: ignore[arg-type,attr-defined]
        trainer.strategy.barrier("HFExport")
