"""Checkpoints in one file: whole or not at all, also on a full disk and in the background."""

import os
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from temper.cli.checkpoint_io import AtomicCheckpointIO, BackgroundCheckpointIO
from temper.cli.checks import check_checkpoint
from temper.errors import TemperError
from temper.sharded_checkpoint import COMMON, Parts, save_file, save_part


class Bomb:
    def __reduce__(self):
        return (os.system, ("true",))


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of three megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        assert not os.environ.get("CI"), mounted.stderr
        pytest.skip(f"mounting a small file system needs root: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def weights(value: float, n: int = 200_000) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((n,), value)}


def test_a_full_disk_is_named_and_the_checkpoint_before_stays(small_disk: Path):
    io, path = AtomicCheckpointIO(), small_disk / "last.ckpt"
    io.save_checkpoint(weights(1.0), path)
    with pytest.raises(
        TemperError, match=r"last.ckpt could not be written \(.*No space left.* MiB are free there"
    ):
        io.save_checkpoint(weights(2.0, 900_000), path)
    assert torch.equal(io.load_checkpoint(path)["weight"], weights(1.0)["weight"])
    assert [file.name for file in small_disk.iterdir()] == ["last.ckpt"]


def test_in_the_background_the_full_disk_is_named_at_the_end_and_nothing_is_removed(
    small_disk: Path,
):
    io, old, new = BackgroundCheckpointIO(), small_disk / "old.ckpt", small_disk / "new.ckpt"
    io.save_checkpoint(weights(1.0), old)
    io.save_checkpoint(weights(2.0, 900_000), new)
    io.remove_checkpoint(old)  # as ModelCheckpoint does once it has saved another
    with pytest.raises(TemperError, match="No space left"):
        io.teardown()
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(old)["weight"], weights(1.0)["weight"])
    assert not new.exists()


def test_in_the_background_a_checkpoint_is_what_it_was_when_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    released = threading.Event()
    saving = AtomicCheckpointIO.save_checkpoint

    def slow(*arguments):
        assert released.wait(60)
        saving(*arguments)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", slow)
    io, state = BackgroundCheckpointIO(), weights(1.0)
    io.save_checkpoint(state, tmp_path / "a.ckpt")
    state["weight"].fill_(7.0)
    assert not (tmp_path / "a.ckpt").exists()
    released.set()
    io.teardown()
    assert torch.equal(io.load_checkpoint(tmp_path / "a.ckpt")["weight"], weights(1.0)["weight"])


def write_parts(folder: Path) -> dict[str, torch.Tensor]:
    """Two ranks, borders anywhere, and a weight that one of them has nothing of."""
    whole = {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(5.0)}
    cuts = [{"a": (0, 7), "b": (0, 5)}, {"a": (7, 12), "b": (5, 5)}]
    for rank, ranges in enumerate(cuts):
        pieces = {name: tensor.flatten()[slice(*ranges[name])] for name, tensor in whole.items()}
        save_part(
            folder,
            rank,
            2,
            {name: list(tensor.shape) for name, tensor in whole.items()},
            ranges,
            {"weights": pieces},
        )
    save_file({"global_step": 3}, folder / COMMON)
    return whole


def test_parts_are_read_across_their_borders(tmp_path: Path):
    whole = write_parts(tmp_path / "x.ckpt")
    parts = Parts(tmp_path / "x.ckpt")
    assert all(torch.equal(parts.weights()[name], tensor) for name, tensor in whole.items())
    assert parts.read("weights", "a", 5, 9).tolist() == [5, 6, 7, 8]
    assert parts.read("weights", "b", 2, 2).numel() == 0
    assert parts.names("weights") == ["a", "b"] and parts.kinds == {"weights"}


@pytest.mark.parametrize("name", ["part-0.pt", "part-1.pt", COMMON])
def test_a_part_that_is_missing_damaged_or_a_bomb_is_refused(tmp_path: Path, name: str):
    folder = tmp_path / "x.ckpt"
    for damage, message in (
        (lambda file: file.write_bytes(file.read_bytes()[:100]), "damaged"),
        (lambda file: torch.save({"x": Bomb()}, file), "can run any code"),
    ):
        write_parts(folder)
        damage(folder / name)
        with pytest.raises(TemperError, match=message):
            check_checkpoint(str(folder))
    if name != COMMON:
        write_parts(folder)
        (folder / name).unlink()
        with pytest.raises(TemperError, match=f"{name} is missing"):
            check_checkpoint(str(folder))


def test_pieces_that_do_not_add_up_are_refused(tmp_path: Path):
    write_parts(tmp_path / "x.ckpt")
    save_part(
        tmp_path / "x.ckpt",
        1,
        2,
        {"a": [3, 4], "b": [5]},
        {"a": (8, 12), "b": (5, 5)},
        {"weights": {"a": torch.zeros(4), "b": torch.zeros(0)}},
    )
    with pytest.raises(TemperError, match="not all of a"):
        Parts(tmp_path / "x.ckpt").whole("weights", "a")


def test_parts_are_refused_where_one_file_is_read(tmp_path: Path):
    write_parts(tmp_path / "x.ckpt")
    with pytest.raises(TemperError, match="a checkpoint in parts"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")
