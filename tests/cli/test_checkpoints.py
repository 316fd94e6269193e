"""Checkpoints on the command line: runs resume from plain ones; pickles that would run code are
refused before they are read.
"""

import pickle
from pathlib import Path

import pytest
import torch
import yaml

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


@pytest.fixture(scope="module")
def saved(temper, tmp_path_factory):
    """A checkpoint of a fit."""
    run = tmp_path_factory.mktemp("saved")
    temper("fit", run, *CHECKPOINTS, data="alignment")
    return _last(run)


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_a_checkpoint_sets_no_option(temper, tmp_path, saved, verb):
    state = torch.load(saved, weights_only=True)
    # Lightning would merge these over the command line.
    network = {"path": str(tmp_path), "trust_remote_code": True}
    state["hyper_parameters"] = {"_class_path": "lightning_modules.DPOModule", "network": network}
    torch.save(state, tmp_path / "other.ckpt")
    run = tmp_path / "run"
    words = (f"--ckpt_path={tmp_path / 'other.ckpt'}", "--trainer.max_steps=3")
    temper(verb, run, *words, data="alignment")
    name = "config.yaml" if verb == "fit" else "config_validate.yaml"
    model = yaml.safe_load((run / name).read_text())["model"]
    assert model["class_path"].endswith("SFTModule")
    assert not model["init_args"]["network"]["trust_remote_code"]


def _without(saved, path, *keys):
    state = torch.load(saved, weights_only=True)
    torch.save({key: value for key, value in state.items() if key not in keys}, path)


FOREIGN = {"state_dict": {"model.w": torch.zeros(2)}, "global_step": 1, "optimizer_states": []}


@pytest.mark.parametrize("verb", ["fit", "validate", "export"])
@pytest.mark.parametrize(
    ("write", "found"),
    [
        (lambda saved, path: path.touch(), "damaged"),
        (lambda saved, path: torch.save([1, 2], path), "holds a list"),
        (lambda saved, path: torch.save({"a": 1}, path), "state_dict"),
        (lambda saved, path: torch.save(FOREIGN, path), "'model.w'"),
        (lambda saved, path: torch.save(FOREIGN | {"state_dict": {"w": 1}}, path), "'w'"),
        (lambda saved, path: _without(saved, path, "global_step"), "global_step"),
        (lambda saved, path: path.mkdir(), "a folder"),
    ],
    ids=["empty", "list", "dictionary", "foreign", "number", "no step", "folder"],
)
def test_no_checkpoint_of_a_run_is_one_line(temper, tmp_path, saved, capsys, verb, write, found):
    path = tmp_path / "other.ckpt"
    write(saved, path)
    with pytest.raises(SystemExit) as exiting:
        temper(verb, tmp_path / "run", f"--ckpt_path={path}", data="alignment")
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert exiting.value.code == 2
    assert line.startswith(f"error: ckpt_path={path}: ") and found in line


@pytest.mark.parametrize("key", ["optimizer_states", "ranks"])
def test_a_fit_does_not_resume_from_weights_alone(temper, tmp_path, saved, capsys, key):
    path = tmp_path / "weights.ckpt"
    _without(saved, path, key)
    with pytest.raises(SystemExit):
        temper("fit", tmp_path / "run", f"--ckpt_path={path}", data="alignment")
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"error: ckpt_path={path}: ") and key in line
    temper("validate", tmp_path / "run", f"--ckpt_path={path}", data="alignment")
