"""Metrics in files, TensorBoard, W&B and MLflow, and where each logger writes them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from temper import packages
from temper.cli.loggers import ContinuedCSVLogger, prepare_loggers, with_defaults
from temper.errors import TemperError


def _events(folder: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]
    }


def test_metrics_go_to_csv_and_tensorboard(temper, tmp_path):
    pytest.importorskip("tensorboard")
    temper("fit", tmp_path)
    header, *rows = (
        line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()
    )
    losses = [
        float(row[header.index("loss/instruct")])
        for row in rows
        if row[header.index("loss/instruct")]
    ]
    assert len(losses) == 2
    assert _events(tmp_path / "tensorboard")["loss/instruct"] == pytest.approx(losses)


def test_without_tensorboard_there_is_csv(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "is_installed", lambda module: False)
    assert isinstance(with_defaults(None, str(tmp_path)), CSVLogger)


@pytest.mark.parametrize("chosen", ["one", "several"])
def test_a_chosen_logger_stands_beside_the_run_folders_metrics(temper, tmp_path, chosen):
    pytest.importorskip("tensorboard")
    one = (
        f"{{class_path: TensorBoardLogger, init_args: {{save_dir: {tmp_path}, name: own, version:"
        " ''}}"
    )
    (tmp_path / "own.yaml").write_text(
        f"trainer: {{logger: {one if chosen == 'one' else f'[{one}]'}}}\n"
    )
    temper("fit", tmp_path / "run", f"--config={tmp_path / 'own.yaml'}")
    assert "loss/instruct" in (tmp_path / "run" / "metrics.csv").read_text()
    assert "loss/instruct" in _events(tmp_path / "own")
    assert not (tmp_path / "run" / "tensorboard").exists(), (
        "TensorBoard is written where it was asked for, and only there"
    )


def test_a_chosen_csv_logger_is_the_only_one(tmp_path):
    own = CSVLogger(tmp_path)
    assert with_defaults([own], "run") == [own]


def test_the_run_folders_logger_comes_first(tmp_path):
    first, second = with_defaults(TensorBoardLogger(tmp_path), "run")
    assert Path(first.log_dir) == Path("run") and isinstance(second, TensorBoardLogger)


def test_loggers_can_be_switched_off(temper, tmp_path):
    temper("fit", tmp_path, "--trainer.logger=false")
    assert not (tmp_path / "metrics.csv").exists() and not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize(
    ("overlay", "logger"), [("wandb", "WandbLogger"), ("mlflow", "MLFlowLogger")]
)
def test_a_logger_whose_package_is_missing_is_refused(refused, monkeypatch, overlay, logger):
    monkeypatch.setattr(packages, "is_installed", lambda module: False)
    line = refused(f"--config=configs/trainer/{overlay}.yaml")
    assert f"trainer.logger={logger}" in line
    assert f"the package {overlay} is not installed: pip install -e '.[{overlay}]'" in line


def _config(name: str, root: Path | None, **arguments: object) -> SimpleNamespace:
    logger = SimpleNamespace(
        class_path=f"lightning.pytorch.loggers.{name}", init_args=SimpleNamespace(**arguments)
    )
    return SimpleNamespace(
        trainer=SimpleNamespace(logger=[logger], default_root_dir=root and str(root))
    )


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(packages, "is_installed", lambda module: True)


@pytest.mark.usefixtures("installed")
def test_wandb_writes_into_the_run_folder_by_default(tmp_path):
    for given, expected in ((".", str(tmp_path)), ("elsewhere", "elsewhere")):
        config = _config("WandbLogger", tmp_path, save_dir=given)
        prepare_loggers(config)
        assert config.trainer.logger[0].init_args.save_dir == expected


@pytest.mark.usefixtures("installed")
def test_mlflow_writes_into_the_run_folder_by_default(tmp_path):
    config = _config(
        "MLFlowLogger",
        tmp_path / "run",
        save_dir="./mlruns",
        tracking_uri=None,
        artifact_location=None,
    )
    prepare_loggers(config)
    arguments = config.trainer.logger[0].init_args
    assert (
        arguments.tracking_uri == f"sqlite:///{tmp_path}/run/mlflow.db"
        and (tmp_path / "run").is_dir()
    )
    assert arguments.artifact_location == (tmp_path / "run" / "mlflow").as_uri()
    config = _config(
        "MLFlowLogger",
        tmp_path,
        save_dir="./mlruns",
        tracking_uri="http://server",
        artifact_location=None,
    )
    prepare_loggers(config)
    assert config.trainer.logger[0].init_args.artifact_location is None


def test_a_logger_that_is_missing_is_named_even_among_others(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "is_installed", lambda module: module != "comet_ml")
    config = _config("CometLogger", tmp_path)
    with pytest.raises(TemperError, match="pip install comet-ml"):
        prepare_loggers(config)


def test_filled_in_settings_are_not_saved_in_the_config(temper, tmp_path, monkeypatch, installed):
    class WandbLogger(CSVLogger):
        def __init__(self, save_dir: str = ".") -> None:
            super().__init__(save_dir, name="wandb", version="")

    WandbLogger.__module__ = "lightning.pytorch.loggers"
    WandbLogger.__qualname__ = "WandbLogger"
    monkeypatch.setattr("lightning.pytorch.loggers.WandbLogger", WandbLogger)
    (tmp_path / "own.yaml").write_text(
        "trainer: {logger: [{class_path: lightning.pytorch.loggers.WandbLogger}]}\n"
    )
    temper("fit", tmp_path / "run", f"--config={tmp_path / 'own.yaml'}")
    assert (tmp_path / "run" / "wandb" / "metrics.csv").exists()
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["trainer"]["logger"][0]["init_args"]["save_dir"] == "."


def _rows(folder: Path, column: str) -> dict[str, str]:
    header, *rows = (line.split(",") for line in (folder / "metrics.csv").read_text().splitlines())
    return {
        row[header.index("step")]: row[header.index(column)]
        for row in rows
        if row[header.index(column)]
    }


def test_a_resumed_run_keeps_the_rows_from_before(temper, tmp_path):
    saving = (
        "--trainer.enable_checkpointing=true",
        "--trainer.callbacks+=ModelCheckpoint",
        f"--trainer.callbacks.dirpath={tmp_path}",
        "--trainer.callbacks.every_n_train_steps=2",
        "--trainer.callbacks.save_top_k=1",
        "--trainer.callbacks.filename=two",
    )
    temper("fit", tmp_path / "whole", "--trainer.max_steps=4")
    temper("fit", tmp_path / "run", "--trainer.max_steps=3", *saving)
    before = _rows(tmp_path / "run", "loss/instruct")
    assert set(before) == {"0", "1", "2"}, "one step further than the checkpoint: it is taken again"
    temper("fit", tmp_path / "run", "--trainer.max_steps=4", f"--ckpt_path={tmp_path / 'two.ckpt'}")
    assert _rows(tmp_path / "run", "loss/instruct") == _rows(tmp_path / "whole", "loss/instruct")
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == len(
        (tmp_path / "whole" / "metrics.csv").read_text().splitlines()
    )


def test_a_new_run_begins_a_new_metrics_file(temper, tmp_path):
    temper("fit", tmp_path, "--trainer.max_steps=3")
    temper("fit", tmp_path, "--trainer.max_steps=1")
    assert set(_rows(tmp_path, "loss/instruct")) == {"0"}


def test_a_resumed_run_writes_metrics_through_no_link(tmp_path):
    own = tmp_path / "thesis.csv"
    own.write_text("step,a\n0,1\n1,2\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").symlink_to(own)
    logger = ContinuedCSVLogger(tmp_path / "run", "", "")
    logger.log_metrics({"a": 7.0}, step=1)
    logger.save()
    assert own.read_text() == "step,a\n0,1\n1,2\n"
    assert _rows(tmp_path / "run", "a") == {"0": "1", "1": "7.0"}
