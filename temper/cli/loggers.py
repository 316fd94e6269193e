"""Where metrics go: ``metrics.csv`` in the run folder always, TensorBoard by default, others as the
config says.
"""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from temper import packages
from temper.errors import TemperError
from temper.run_folder import write_text

DEFAULT_ROOT = "runs/unnamed"
# Module that a logger of Lightning needs.
MODULES = {
    "TensorBoardLogger": "tensorboard",
    "WandbLogger": "wandb",
    "MLFlowLogger": "mlflow",
    "CometLogger": "comet_ml",
    "NeptuneLogger": "neptune",
}

# -- loggers of the config


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


# The default folders of Lightning's loggers lie in the current folder; they move into the run
# folder unless the config names another.
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
        module = MODULES.get(name)
        if module is not None and not packages.is_installed(module):
            raise TemperError(
                f"trainer.logger={name}: {packages.install_hint(module)}, or drop the logger"
            )
        if name in FOLDERS:
            FOLDERS[name](logger.init_args, Path(config.trainer.default_root_dir or DEFAULT_ROOT))


def _chosen(logger: Any) -> Iterable[Any]:
    """Configs of the loggers that are given by class."""
    several = logger if isinstance(logger, list) else [logger]
    return (one for one in several if hasattr(one, "class_path"))


# -- loggers of a run


class ContinuedCSVLogger(CSVLogger):
    """Lightning's CSV logger for a resumed run: earlier rows are kept, those of repeated steps are
    replaced.
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
        self.is_truncated = False

    def _check_log_dir_exists(self) -> None:
        """Nothing: Lightning's removes the file."""

    def save(self) -> None:
        if self.metrics and not self.is_truncated:
            self.is_truncated = True
            if Path(self.metrics_file_path).is_file():
                self._truncate(min(row["step"] for row in self.metrics))
        super().save()

    def _truncate(self, step: float) -> None:
        """Keep the rows of the steps before this one."""
        with open(self.metrics_file_path, newline="") as file:
            reader = csv.DictReader(file)
            kept = [row for row in reader if float(row["step"]) < step]
            self.metrics_keys = list(reader.fieldnames or [])
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.metrics_keys)
        writer.writeheader()
        writer.writerows(kept)
        write_text(Path(self.metrics_file_path), text.getvalue())


def with_defaults(logger: Any, folder: str, resumed: bool = False) -> Any:
    """The loggers of a run: ``metrics.csv`` in the run folder is one of them, unless logging is
    switched off.

    Args:
        logger: What the config says: nothing (or true), false, a logger, or several.
        folder: The run folder.
        resumed: Keep the rows that were written before the run was interrupted.
    """
    if logger is False:
        return False
    metrics = (ContinuedCSVLogger if resumed else CSVLogger)(folder, name="", version="")
    if logger in (None, True):
        if not packages.is_installed("tensorboard"):
            return metrics
        return [metrics, TensorBoardLogger(folder, name="tensorboard", version="")]
    chosen = [logger] if isinstance(logger, Logger) else list(logger)
    if any(isinstance(one, CSVLogger) for one in chosen):
        return chosen
    return [metrics, *chosen]  # first, since the first logger's folder is the run's
