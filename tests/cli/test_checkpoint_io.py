"""Checkpoints, single files and sharded ones: complete or absent, also on a full disk and in the
background; damaged or unsafe ones are refused.
"""

import os
import random
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from temper.checkpoint_file import load_checkpoint, load_file, save_file
from temper.cli.checkpoint_io import AtomicCheckpointIO, BackgroundCheckpointIO
from temper.cli.checkpoints import check_checkpoint
from temper.errors import TemperError
from temper.sharded_checkpoint import (
    COMMON,
    ShardedCheckpoint,
    _replace_checkpoint,
    is_sharded,
    save_shard,
)
from tests.pickles import Bomb


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


def plain_weights(value: float, n: int = 200_000) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((n,), value)}


def test_a_full_disk_is_named_and_the_earlier_checkpoint_stays(small_disk: Path):
    io = AtomicCheckpointIO()
    path = small_disk / "last.ckpt"
    io.save_checkpoint(plain_weights(1.0), path)
    with pytest.raises(
        TemperError, match=r"last.ckpt could not be written \(.*No space left.* MiB are free there"
    ):
        io.save_checkpoint(plain_weights(2.0, 900_000), path)
    assert torch.equal(load_file(path)["weight"], plain_weights(1.0)["weight"])
    assert [file.name for file in small_disk.iterdir()] == ["last.ckpt"]


def test_a_background_save_on_a_full_disk_removes_nothing(small_disk: Path):
    io = BackgroundCheckpointIO()
    old = small_disk / "old.ckpt"
    new = small_disk / "new.ckpt"
    io.save_checkpoint(plain_weights(1.0), old)
    io.save_checkpoint(plain_weights(2.0, 900_000), new)
    io.remove_checkpoint(old)  # as ModelCheckpoint does once it has saved another
    with pytest.raises(TemperError, match="No space left"):
        io.teardown()
    assert torch.equal(load_file(old)["weight"], plain_weights(1.0)["weight"])
    assert not new.exists()


def test_a_background_save_holds_the_values_at_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    released = threading.Event()
    saving = AtomicCheckpointIO.save_checkpoint

    def slow(*arguments):
        assert released.wait(60)
        saving(*arguments)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", slow)
    io = BackgroundCheckpointIO()
    state = plain_weights(1.0)
    io.save_checkpoint(state, tmp_path / "a.ckpt")
    state["weight"].fill_(7.0)
    assert not (tmp_path / "a.ckpt").exists()
    released.set()
    io.teardown()
    assert torch.equal(load_file(tmp_path / "a.ckpt")["weight"], plain_weights(1.0)["weight"])


SHAPES = {"a": [3, 4], "b": [5]}
# Of two ranks: shards that end anywhere, and a weight of which one rank holds nothing.
RANGES = ({"a": (0, 7), "b": (0, 5)}, {"a": (7, 12), "b": (5, 5)})


def whole_weights() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(5.0)}


def shards_of(rank: int) -> dict[str, torch.Tensor]:
    return {
        name: tensor.flatten()[slice(*RANGES[rank][name])]
        for name, tensor in whole_weights().items()
    }


def write_sharded(folder: Path) -> None:
    for rank, ranges in enumerate(RANGES):
        save_shard(folder, rank, 2, SHAPES, ranges, {"weights": shards_of(rank)})
    save_file({"global_step": 3}, folder / COMMON)


def test_ranges_are_read_across_the_ends_of_shards(tmp_path: Path):
    write_sharded(tmp_path / "x.ckpt")
    checkpoint = ShardedCheckpoint(tmp_path / "x.ckpt")
    for name, tensor in whole_weights().items():
        assert torch.equal(checkpoint.weights()[name], tensor)
    assert checkpoint.read("weights", "a", 5, 9).tolist() == [5, 6, 7, 8]
    assert checkpoint.read("weights", "b", 2, 2).numel() == 0
    assert checkpoint.names("weights") == ["a", "b"]
    assert checkpoint.kinds == {"weights"}


def test_checkpoints_of_earlier_versions_are_read(tmp_path: Path):
    folder = tmp_path / "old.ckpt"
    folder.mkdir()
    torch.save({"global_step": 3, "single_values": [], "param_groups": []}, folder / "common.pt")
    for rank, ranges in enumerate(RANGES):
        content = {
            "world_size": 2,
            "shapes": SHAPES,
            "ranges": {name: list(bounds) for name, bounds in ranges.items()},
            "pieces": {
                "weights": shards_of(rank),
                "optimizer.exp_avg": {"a": shards_of(rank)["a"]},
            },
        }
        torch.save(content, folder / f"part-{rank}.pt")
    assert is_sharded(folder)
    checkpoint = ShardedCheckpoint(folder)
    for name, tensor in whole_weights().items():
        assert torch.equal(checkpoint.weights()[name], tensor)
    assert checkpoint.names("optimizer.exp_avg") == ["a"]
    assert torch.equal(checkpoint.whole("optimizer.exp_avg", "a"), whole_weights()["a"])


@pytest.mark.parametrize("name", ["part-0.pt", "part-1.pt", COMMON])
def test_a_missing_damaged_or_unsafe_shard_is_refused(tmp_path: Path, name: str):
    folder = tmp_path / "x.ckpt"
    marker = tmp_path / "marker"
    for damage, message in (
        (lambda file: file.write_bytes(file.read_bytes()[:100]), "damaged"),
        (lambda file: torch.save({"x": Bomb(marker)}, file), "can run any code"),
    ):
        write_sharded(folder)
        damage(folder / name)
        with pytest.raises(TemperError, match=message):
            check_checkpoint(str(folder), "fit")
    assert not marker.exists()
    if name != COMMON:
        write_sharded(folder)
        (folder / name).unlink()
        with pytest.raises(TemperError, match=f"{name} is missing"):
            check_checkpoint(str(folder), "fit")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("as_zip", [True, False])
def test_whatever_is_damaged_is_one_line(tmp_path: Path, as_zip: bool):
    """torch's reader fails with exceptions of a dozen kinds."""
    path = tmp_path / "last.ckpt"
    content = {"state_dict": {"network.a": torch.ones(3)}, "global_step": 1}
    torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    whole = path.read_bytes()
    drawn = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[drawn.randrange(min(len(whole), 700))] = drawn.randrange(256)
        path.write_bytes(damaged)
        try:
            load_checkpoint(path)
        except TemperError as error:
            refused += 1
            assert "\n" not in str(error) and f"ckpt_path={path}: " in str(error)
    assert refused > 20


def test_shards_that_do_not_add_up_are_refused(tmp_path: Path):
    write_sharded(tmp_path / "x.ckpt")
    save_shard(
        tmp_path / "x.ckpt",
        1,
        2,
        SHAPES,
        {"a": (8, 12), "b": (5, 5)},
        {"weights": {"a": torch.zeros(4), "b": torch.zeros(0)}},
    )
    with pytest.raises(TemperError, match="not all of a"):
        ShardedCheckpoint(tmp_path / "x.ckpt").whole("weights", "a")


def test_a_sharded_checkpoint_is_refused_as_a_single_file(tmp_path: Path):
    write_sharded(tmp_path / "x.ckpt")
    with pytest.raises(TemperError, match="a sharded checkpoint"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")


# -- what is replaced and deleted


def test_a_sharded_checkpoint_is_replaced_by_a_single_file(tmp_path: Path):
    write_sharded(tmp_path / "last.ckpt")
    AtomicCheckpointIO().save_checkpoint(plain_weights(1.0), tmp_path / "last.ckpt")
    assert torch.equal(load_file(tmp_path / "last.ckpt")["weight"], plain_weights(1.0)["weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_users_folder_with_a_checkpoints_name_stays(tmp_path: Path):
    write_sharded(tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt" / "notes.txt").write_text("mine")
    with pytest.raises(TemperError, match="last.ckpt: a folder that holds 'notes.txt'"):
        AtomicCheckpointIO().save_checkpoint(plain_weights(1.0), tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match="not deleted, since it holds 'notes.txt'"):
        AtomicCheckpointIO().remove_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(TemperError, match=r"last.ckpt: holds 'notes.txt'.*not replaced"):
        write_sharded(tmp_path / ".last.ckpt.partial")
        _replace_checkpoint(tmp_path / "last.ckpt", tmp_path / ".last.ckpt.partial")
    assert (tmp_path / "last.ckpt" / "notes.txt").read_text() == "mine"
    assert is_sharded(tmp_path / "last.ckpt")


def test_own_checkpoints_are_deleted_and_replaced(tmp_path: Path):
    write_sharded(tmp_path / "a.ckpt")
    save_file(plain_weights(1.0), tmp_path / "b.ckpt")
    for name in ("a.ckpt", "b.ckpt"):
        write_sharded(tmp_path / f".{name}.partial")
        _replace_checkpoint(tmp_path / name, tmp_path / f".{name}.partial")
        assert is_sharded(tmp_path / name)
        AtomicCheckpointIO().remove_checkpoint(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_checkpoints_is_deleted(tmp_path: Path):
    """A checkpoint that is resumed from names older ones, and could name anything."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.ckpt").write_text("mine")
    io = AtomicCheckpointIO()
    for path in ("thesis", "checkpoints/../thesis/a.ckpt", "thesis/../thesis"):
        with pytest.warns(UserWarning, match="is not deleted: no checkpoint's name"):
            io.remove_checkpoint(tmp_path / path)
    (tmp_path / "checkpoints" / "last.ckpt").symlink_to(tmp_path / "thesis")
    io.remove_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert not (tmp_path / "checkpoints" / "last.ckpt").is_symlink()
    assert (tmp_path / "thesis" / "a.ckpt").read_text() == "mine"


def test_a_checkpoint_is_written_through_no_link(tmp_path: Path):
    own = tmp_path / "thesis.txt"
    own.write_text("years of work")
    (tmp_path / ".a.ckpt.partial").symlink_to(own)
    (tmp_path / "a.ckpt").symlink_to(own)
    save_file(plain_weights(1.0), tmp_path / "a.ckpt")
    assert own.read_text() == "years of work" and not (tmp_path / "a.ckpt").is_symlink()
