"""``python train.py export``: a Hugging Face folder from a checkpoint, or from the config alone."""

from pathlib import Path

import pytest
import torch

from temper.checkpoint_file import save_file
from temper.output_folder import MARKER
from temper.sharded_checkpoint import COMMON, save_shard

LORA = ("--model.init_args.network.lora.rank=2", "--model.init_args.network.lora.targets=[q_proj]")


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _checkpoint(folder: Path) -> Path:
    return next((folder / "checkpoints").glob("*.ckpt"))


@pytest.fixture(scope="module")
def run(temper, tmp_path_factory) -> Path:
    """A tiny run that kept a checkpoint."""
    folder = tmp_path_factory.mktemp("checkpointed")
    temper("fit", folder, "--trainer.enable_checkpointing=true")
    return folder


def test_the_export_of_a_checkpoint_is_that_of_the_run(command_line, run, tmp_path):
    command_line(
        "export",
        f"--config={run / 'config.yaml'}",
        f"--ckpt_path={_checkpoint(run)}",
        f"--folder={tmp_path / 'out'}",
    )
    assert _files(tmp_path / "out") == _files(run / "export")


def test_the_export_of_a_sharded_checkpoint_is_that_of_the_run(command_line, run, tmp_path):
    folder = tmp_path / "sharded.ckpt"
    checkpoint = torch.load(_checkpoint(run), weights_only=True)
    state = checkpoint.pop("state_dict")
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    sizes = {name: tensor.numel() for name, tensor in state.items()}
    ranges_of_ranks = [
        {name: (0, size // 3) for name, size in sizes.items()},
        {name: (size // 3, size) for name, size in sizes.items()},
    ]
    for rank, ranges in enumerate(ranges_of_ranks):
        shards = {name: tensor.flatten()[slice(*ranges[name])] for name, tensor in state.items()}
        save_shard(folder, rank, 2, shapes, ranges, {"weights": shards})
    save_file(checkpoint, folder / COMMON)
    command_line(
        "export",
        f"--config={run / 'config.yaml'}",
        f"--ckpt_path={folder}",
        f"--folder={tmp_path / 'out'}",
    )
    assert _files(tmp_path / "out") == _files(run / "export")


def test_an_adapter_folder_is_merged_without_training(temper, command_line, tiny_run, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("trainer: {callbacks: [{class_path: HFExport, init_args: {merge: false}}]}\n")
    temper("fit", tmp_path / "lora", *LORA, f"--config={own}", model=tiny_run / "export")
    assert "adapter_model.safetensors" in _files(tmp_path / "lora" / "export")
    temper(
        "export",
        tmp_path / "x",
        f"--folder={tmp_path / 'merged'}",
        model=tmp_path / "lora" / "export",
    )
    files = _files(tmp_path / "merged")
    assert "model.safetensors" in files and "adapter_config.json" not in files
    assert (
        b"merged into the weights" in files["README.md"]
        and b"What was done" not in files["README.md"]
    )


def test_an_adapter_in_a_checkpoint_is_exported_alone(temper, command_line, tiny_run, tmp_path):
    run = tmp_path / "run"
    out = tmp_path / "out"
    temper("fit", run, *LORA, "--trainer.enable_checkpointing=true", model=tiny_run / "export")
    command_line(
        "export",
        f"--config={run / 'config.yaml'}",
        f"--ckpt_path={_checkpoint(run)}",
        f"--folder={out}",
        "--merge=false",
    )
    assert set(_files(out)) >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    assert "model.safetensors" not in _files(out)


def test_a_checkpoint_of_another_network_is_refused(refused, run, tmp_path):
    line = refused(
        f"--ckpt_path={_checkpoint(run)}",
        "--model.init_args.network.shape.n_layers=2",
        verb="export",
    )
    assert (
        f"ckpt_path={_checkpoint(run)}: not a checkpoint of this network" in line
        and "layers.2" in line
    )


def test_a_checkpoint_that_lacks_weights_is_refused(refused, run, tmp_path):
    checkpoint = torch.load(_checkpoint(run), weights_only=True)
    checkpoint["state_dict"] = dict(list(checkpoint["state_dict"].items())[1:])
    torch.save(checkpoint, tmp_path / "half.ckpt")
    assert "embed_tokens" in refused(f"--ckpt_path={tmp_path / 'half.ckpt'}", verb="export")


def test_a_checkpoint_that_is_not_there_is_refused(refused):
    assert "no such checkpoint" in refused("--ckpt_path=nowhere.ckpt", verb="export")


def test_a_users_folder_is_refused_before_anything_is_built(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("temper.models.load.build_network", lambda *_: pytest.fail("it was built"))
    own = tmp_path / "thesis"
    own.mkdir()
    (own / "notes.txt").write_text("mine")
    line = refused(f"--folder={own}", verb="export")
    assert line.startswith(f"--folder={own}: holds notes.txt, ")
    assert "a symbolic link" in refused(f"--folder={_link(own)}", verb="export")
    assert "is a file" in refused(f"--folder={own / 'notes.txt' / 'export'}", verb="export")
    assert _files(own) == {"notes.txt": b"mine"}


def _link(folder: Path) -> Path:
    link = folder.with_name("link")
    link.symlink_to(folder)
    return link


def test_an_export_of_an_earlier_version_has_a_way_out(temper, refused, tmp_path, capsys):
    out = tmp_path / "out"
    for _ in range(2):  # its own export is replaced
        temper("export", tmp_path / "x", f"--folder={out}")
    (out / MARKER).unlink()
    capsys.readouterr()
    line = refused(f"--folder={out}", verb="export")
    assert "earlier versions wrote none" in line and "move or delete this one" in line
