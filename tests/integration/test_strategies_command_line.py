"""The command line on two ranks: sharded training, evaluation of its checkpoint, export."""

from pathlib import Path

import pytest

from tests.integration.strategy_runs import train_py

pytestmark = pytest.mark.distributed
FILES = ("trainer/cpu", "trainer/fsdp2", "objective/booster", "model/tiny", "data/alignment")
SIZES = {
    "n_eval": 16,
    "n_alignment": 64,
    "n_harmful": 32,
    "batch_size": 16,
    "harmful_batch_size": 16,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp2")
    train_py(
        "fit",
        *(f"--config=configs/{name}.yaml" for name in FILES),
        *(f"--data.init_args.{name}={value}" for name, value in SIZES.items()),
        "--trainer.devices=2",
        "--trainer.max_steps=6",
        "--trainer.val_check_interval=6",
        "--trainer.enable_checkpointing=true",
        f"--trainer.default_root_dir={folder}",
    )
    return folder


def checkpoint(run: Path) -> Path:
    (path,) = (run / "checkpoints").iterdir()
    return path


def test_a_sharded_checkpoint_is_exported_as_the_run_exported(run: Path, tmp_path: Path):
    train_py(
        "export",
        f"--config={run / 'config.yaml'}",
        f"--ckpt_path={checkpoint(run)}",
        f"--folder={tmp_path / 'out'}",
    )
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        run / "export" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
def test_every_sharded_strategy_gives_the_same_answers(run: Path, tmp_path: Path, strategy: str):
    words = (
        f"--trainer.strategy={strategy}",
        f"--ckpt_path={checkpoint(run)}",
        f"--trainer.default_root_dir={tmp_path}",
    )
    train_py("validate", f"--config={run / 'config.yaml'}", *words)
    assert (tmp_path / "generations.jsonl").read_text() == (run / "generations.jsonl").read_text()
    assert len((run / "generations.jsonl").read_text().splitlines()) == 32
