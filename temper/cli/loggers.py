"""Where metrics go: ``metrics.csv`` in the run folder always, TensorBoard by default, others as the
config says.
"""

import csv
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from temper.errors import TemperError

# Package that a logger of Lightning needs, and what to install.
PACKAGES = {
    "TensorBoardLogger": ("tensorboard", "tensorboard"),
    "WandbLogger": ("wandb", "wandb"),
    "MLFlowLogger": ("mlflow", "mlflow"),
    "CometLogger": ("comet_ml", "comet-ml"),
    "NeptuneLogger": ("neptune", "neptune"),
}
DEFAULT_ROOT = "runs/unnamed"


def _wandb_folder(arguments: Any, run: Path) -> None:
    if arguments.save_dir == ".":
        arguments.save_dir = str(run)


def _mlflow_folder(arguments: Any, run: Path) -> None:
    if arguments.tracking_uri is None and arguments.save_dir == "./mlruns":
        # A database: MLflow refuses to begin a store of plain files.
        run.mkdir(parents=True, exist_ok=True)
        arguments.tracking_uri = f"sqlite:///{run / 'mlflow.db'}"
        arguments.artifact_location = (
            arguments.artifact_location or (run / "mlflow").absolute().as_uri()
        )


# Lightning's default folders lie where one happens to stand; left as they are, they move into the
# run folder.
FOLDERS = {"WandbLogger": _wandb_folder, "MLFlowLogger": _mlflow_folder}


def prepare_loggers(config: Any) -> None:
    """Refuse loggers whose package is missing, and put the files of the others into the run folder.

    Args:
        config: The verb's config; ``trainer.logger`` is changed in place.

    Raises:
        TemperError: naming the logger, the package and how to install it.
    """
    for logger in _chosen(config.trainer.logger):
        name = logger.class_path.rpartition(".")[2]
        module, package = PACKAGES.get(name, (None, None))
        if module is not None and find_spec(module) is None:
            raise TemperError(
                f"trainer.logger={name}: the package {package} is not installed; pip install"
                f" {package}, or drop the logger"
            )
        if name in FOLDERS:
            FOLDERS[name](logger.init_args, Path(config.trainer.default_root_dir or DEFAULT_ROOT))


class ContinuedCSVLogger(CSVLogger):
    """Lightning's, for a run that is resumed: rows from before are kept, but for those of steps
    that are taken again.
    """

    @property
    def experiment(self) -> Any:
        """The writer; made when something is logged for the first time."""
        if self._experiment is None:
            self._experiment = _ContinuedWriter(self.log_dir)
        return self._experiment


class _ContinuedWriter(ExperimentWriter):
    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.is_cut = False

    def _check_log_dir_exists(self) -> None:
        """Nothing: Lightning's removes the file."""

    def save(self) -> None:
        if self.metrics and not self.is_cut:
            self.is_cut = True
            if Path(self.metrics_file_path).is_file():
                self._cut(min(row["step"] for row in self.metrics))
        super().save()

    def _cut(self, step: float) -> None:
        with open(self.metrics_file_path, newline="") as file:
            reader = csv.DictReader(file)
            kept, self.metrics_keys = (
                [row for row in reader if float(row["step"]) < step],
                list(reader.fieldnames or []),
            )
        with open(self.metrics_file_path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(kept)


def with_defaults(logger: Any, folder: str, resumed: bool = False) -> Any:
    """The loggers of a run: ``metrics.csv`` straight in the run folder is one of them unless there
    are to be none at all.

    Args:
        logger: What the config says: nothing (or true), false, a logger, or several.
        folder: The run folder.
        resumed: Keep what an earlier part of the run wrote there.
    """
    if logger is False:
        return False
    metrics = (ContinuedCSVLogger if resumed else CSVLogger)(folder, name="", version="")
    if logger in (None, True):
        return (
            [metrics, TensorBoardLogger(folder, name="tensorboard", version="")]
            if find_spec("tensorboard")
            else metrics
        )
    chosen = [logger] if isinstance(logger, Logger) else list(logger)
    # First, since the first logger's folder is the run's.
    return chosen if any(isinstance(one, CSVLogger) for one in chosen) else [metrics, *chosen]


def _chosen(logger: Any) -> Iterable[Any]:
    """Configs of the loggers that are given by class."""
    several = logger if isinstance(logger, list) else [logger]
    return (one for one in several if hasattr(one, "class_path"))
