"""Checkpoints on the command line: runs resume from plain ones; pickles that would run code are
refused before they are read.
"""

import pickle
from pathlib import Path

import pytest
import torch

from tests.pickles import Bomb

CHECKPOINTS = (
    "--trainer.enable_checkpointing=true",
    "--trainer.callbacks+=ModelCheckpoint",
    "--trainer.callbacks.save_last=true",
    "--trainer.callbacks.every_n_train_steps=1",
)
BOOSTER = ("--config=configs/objective/held_booster.yaml",)  # it holds vectors between steps


def _last(folder: Path) -> Path:
    return next(folder.rglob("last.ckpt"))


def test_a_run_resumes_from_a_checkpoint_of_plain_values(temper, tmp_path):
    temper("fit", tmp_path / "a", *BOOSTER, *CHECKPOINTS, data="alignment")
    state = torch.load(_last(tmp_path / "a"), weights_only=True)
    assert state["global_step"] == 2 and state["vectors"]["held"]
    temper(
        "fit",
        tmp_path / "b",
        *BOOSTER,
        "--trainer.max_steps=3",
        f"--ckpt_path={_last(tmp_path / 'a')}",
        *CHECKPOINTS,
        data="alignment",
    )
    assert torch.load(_last(tmp_path / "b"), weights_only=True)["global_step"] == 3


@pytest.mark.parametrize("verb", ["fit", "validate"])
@pytest.mark.parametrize(
    "write", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))]
)
def test_a_pickle_bomb_is_refused_unread_in_one_line(temper, tmp_path, capsys, verb, write):
    bomb = tmp_path / "bomb.ckpt"
    marker = tmp_path / "marker"
    write({"state_dict": {}, "hyper_parameters": {"a": Bomb(marker)}}, bomb)
    with pytest.raises(SystemExit):
        temper(verb, tmp_path / "run", f"--ckpt_path={bomb}")
    said = capsys.readouterr().err.strip()
    assert (
        said.startswith(f"error: ckpt_path={bomb}: refused")
        and "can run any code" in said
        and "\n" not in said
    )
    assert not marker.exists()
    torch.load(bomb, weights_only=False) if write is torch.save else pickle.loads(bomb.read_bytes())
    assert marker.exists(), "the payload works"


def test_a_damaged_checkpoint_is_named(temper, tmp_path, capsys):
    torch.save({"state_dict": {"w": torch.zeros(1000)}}, tmp_path / "whole.ckpt")
    (tmp_path / "half.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:1500])
    with pytest.raises(SystemExit):
        temper("fit", tmp_path / "run", f"--ckpt_path={tmp_path / 'half.ckpt'}")
    assert "half.ckpt: " in capsys.readouterr().err


def test_reading_pickles_cannot_be_switched_on(temper, tmp_path, capsys):
    with pytest.raises(SystemExit):
        temper("fit", tmp_path / "run", "--weights_only=false")
    assert "weights_only=false cannot be honoured" in capsys.readouterr().err
