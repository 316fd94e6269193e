"""Keep the resolved config in the run folder, whatever happens to the job."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.cli import SaveConfigCallback

from temper.cli.snapshot import write_snapshot
from temper.run_folder import write_text


class SaveConfig(SaveConfigCallback):
    """Write ``config.yaml``; a different one already there is kept as ``config.1.yaml``, and so on.

    Lightning's own refuses to start when the file exists, which ends a requeued job.
    """

    def __init__(self, parser: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(parser, config, **(kwargs | {"overwrite": True, "save_to_log_dir": False}))

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save on the first rank; validation and test keep theirs beside the training's."""
        folder = Path(trainer.default_root_dir)
        name = "config" if stage == "fit" else f"config_{getattr(stage, 'value', stage)}"
        text = as_saved(self.parser, self.config)
        target = folder / f"{name}.yaml"
        if target.exists() and target.read_text() != text:
            number = 1
            while (folder / f"{name}.{number}.yaml").exists():
                number += 1
            target.rename(folder / f"{name}.{number}.yaml")
        write_text(target, text)
        if stage == "fit":
            write_snapshot(folder)


def as_saved(parser: Any, config: Any) -> str:
    """The text of a verb's ``config.yaml``.

    Arguments of the verb that were not given would keep other verbs from reading the file: `preview`, `export`.
    """
    config = config.clone()
    for argument in ("ckpt_path", "weights_only"):
        if config.get(argument) is None:
            config.pop(argument, None)
    return str(parser.dump(config, skip_none=False))
