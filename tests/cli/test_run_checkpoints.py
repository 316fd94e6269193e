"""Checkpoints belong to their run and to its config, whichever verb reads them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from temper.cli.checkpoints import check_belongs
from temper.errors import TemperError
from temper.slurm import preempted_checkpoints

SAVER = (
    "--trainer.enable_checkpointing=true",
    "--trainer.callbacks+=ModelCheckpoint",
    "--trainer.callbacks.save_last=true",
    "--trainer.callbacks.save_top_k=0",
    "--trainer.callbacks.every_n_train_steps=2",
)
THREE = ("--trainer.max_steps=3", "--trainer.val_check_interval=3")


@pytest.fixture(scope="module")
def first(temper, tmp_path_factory) -> Path:
    """A run of three steps; read it, do not write to it."""
    folder = tmp_path_factory.mktemp("first")
    temper("fit", folder, *SAVER, *THREE)
    return folder


@pytest.fixture
def run(first, tmp_path) -> Path:
    """A copy of the run, whose config.yaml still names the first one's folder."""
    return shutil.copytree(first, tmp_path / "run")


def _last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def _state(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def _weights(path: Path) -> dict:
    return {name: value.clone() for name, value in _state(path)["state_dict"].items()}


def _same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _line(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def _refused(capsys, action) -> str:
    with pytest.raises(SystemExit) as exiting:
        action()
    line = _line(capsys)
    assert exiting.value.code == 2 and line.startswith("error: "), line
    return line


# -- last.ckpt is the last


def test_last_has_the_last_step(first):
    assert _state(_last(first))["global_step"] == 3  # it is saved every second one


def test_a_second_fit_has_last_and_moves_the_first(temper, command_line, run, tmp_path, capsys):
    before = _weights(_last(run))
    (run / "hpc_ckpt_1.ckpt").write_bytes(_last(run).read_bytes())
    temper("fit", run, *SAVER, *THREE, "--model.optimizer.lr=0.01")
    assert f"moved to {run / 'earlier.1'}" in capsys.readouterr().out
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    moved = run / "earlier.1" / "checkpoints" / "last.ckpt"
    assert _same(_weights(moved), before) and not _same(_weights(_last(run)), before)
    assert (run / "earlier.1" / "hpc_ckpt_1.ckpt").exists() and not preempted_checkpoints(run)
    command_line(
        "export",
        f"--config={run / 'config.yaml'}",
        f"--ckpt_path={_last(run)}",
        f"--folder={tmp_path / 'out'}",
    )
    weights = [folder / "model.safetensors" for folder in (run / "export", tmp_path / "out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    words = (f"--config={run / 'config.yaml'}", f"--ckpt_path={moved}")
    line = _refused(capsys, lambda: command_line("fit", *words))
    assert "model.optimizer.lr=0.001, and the config has 0.01" in line and str(moved) in line


def test_last_has_the_last_step_where_it_was_a_link(temper, tmp_path):
    words = ("--trainer.callbacks.save_last=link", "--trainer.callbacks.save_top_k=-1")
    temper("fit", tmp_path, *SAVER, *THREE, *words)
    assert _state(_last(tmp_path))["global_step"] == 3
    (other,) = set((tmp_path / "checkpoints").iterdir()) - {_last(tmp_path)}
    assert _state(other)["global_step"] == 2


def test_a_second_fit_that_saves_nothing_moves_them_too(temper, command_line, run, capsys):
    (run / "checkpoints" / "unexported.ckpt").write_bytes(_last(run).read_bytes())
    temper("fit", run, *THREE, "--model.optimizer.lr=0.01", "--data.seed=3")
    names = {path.name for path in (run / "earlier.1" / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "unexported.ckpt"} and not _last(run).exists()
    shutil.rmtree(run / "export")
    line = _refused(capsys, lambda: command_line("validate", f"--config={run / 'config.yaml'}"))
    assert "left neither an export nor a checkpoint" in line  # and not the first fit's


def test_a_resumed_fit_replaces_last(temper, run):
    words = ("--trainer.max_steps=5", "--trainer.val_check_interval=5", "--ckpt_path=last")
    # Another setting of the callback: Lightning would not know its own file again.
    temper("fit", run, *SAVER, *words, "--trainer.callbacks.every_n_train_steps=1")
    assert _state(_last(run))["global_step"] == 5
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert not list(run.glob("earlier.*"))
    assert "ckpt_path" not in yaml.safe_load((run / "config.yaml").read_text())


def test_nothing_is_moved_in_a_folder_elsewhere(temper, tmp_path, capsys):
    words = (*SAVER, f"--trainer.callbacks.dirpath={tmp_path / 'kept'}")
    temper("fit", tmp_path / "a", *words)
    line = _refused(capsys, lambda: temper("fit", tmp_path / "b", *words))
    assert "ModelCheckpoint.dirpath=" in line and "last.ckpt" in line
    last = tmp_path / "kept" / "last.ckpt"
    assert _state(last)["global_step"] == 2
    temper("fit", tmp_path / "a", *words, f"--ckpt_path={last}", "--trainer.max_steps=3")
    assert _state(last)["global_step"] == 3 and [*last.parent.iterdir()] == [last]


@pytest.mark.parametrize("verb", ["fit", "validate", "predict", "export"])
@pytest.mark.parametrize("name", ["last", "hpc", "best", "registry:mine"])
def test_a_name_without_a_checkpoint_is_refused(temper, tmp_path, capsys, verb, name):
    line = _refused(capsys, lambda: temper(verb, tmp_path / "run", f"--ckpt_path={name}"))
    assert f"ckpt_path={name}" in line and "give" in line


def test_last_is_the_newer_of_last_and_preempted(command_line, run, tmp_path, capsys):
    preempted = run / "hpc_ckpt_1.ckpt"
    preempted.write_bytes(_last(run).read_bytes())
    os.utime(_last(run), (1, 1))
    out = tmp_path / "out"
    shutil.rmtree(run / "export")
    command_line("export", f"--config={run / 'config.yaml'}", f"--folder={out}")
    assert str(preempted) in capsys.readouterr().err and (out / "config.json").exists()


# -- one comparison


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--model.optimizer.lr=0.01", "model.optimizer.lr=0.001, and the config has 0.01"),
        ("--model=RMUModule", "model.class_path=lightning_modules.SFTModule"),
        ("--model.network.shape.n_layers=2", "model.network.shape.n_layers=3"),
        ("--model.network.lora.rank=2", "model.network.lora=null"),
        ("--data.batch_size=2", "data.batch_size=4, and the config has 2"),
        ("--data.seed=5", "data.seed=0"),
        ("--seed_everything=5", "seed_everything=0"),
    ],
)
def test_a_fit_resumes_its_own_training_only(temper, first, tmp_path, capsys, word, said):
    words = (*SAVER, f"--ckpt_path={_last(first)}", "--trainer.max_steps=4", word)
    line = _refused(capsys, lambda: temper("fit", tmp_path / "run", *words))
    assert f"ckpt_path={_last(first)}" in line and said in line and "config.yaml" in line


def test_settings_of_speed_and_evaluation_may_change(temper, first, tmp_path):
    words = ("--model.micro_batch_size=2", "--data.eval_batch_size=2", "--trainer.max_steps=4")
    temper("fit", tmp_path / "run", f"--ckpt_path={_last(first)}", *words)


def test_how_evaluation_files_are_read_may_change():
    then = {"data": {"init_args": {"eval_layout": None, "layout": "auto"}}}
    check_belongs("it", then, _with(then, "eval_layout", "alpaca"), "fit", "")
    with pytest.raises(TemperError, match=r"data\.layout=auto, and the config has alpaca"):
        check_belongs("it", then, _with(then, "layout", "alpaca"), "fit", "")


def _with(settings: dict, name: str, value: str) -> dict:
    return {"data": {"init_args": settings["data"]["init_args"] | {name: value}}}


@pytest.mark.parametrize("verb", ["validate", "test", "predict", "export"])
def test_an_evaluation_needs_the_same_network(temper, first, tmp_path, capsys, verb):
    given = (f"--ckpt_path={_last(first)}",)
    for word in ("--model.network.shape.n_layers=2", "--model.network.lora.rank=2"):
        line = _refused(capsys, lambda word=word: temper(verb, tmp_path / "x", *given, word))
        assert "model.network." in line and "the config has" in line
    folder = (f"--folder={tmp_path / 'out'}",) if verb == "export" else ()
    temper(verb, tmp_path / "run", *given, *folder, "--model.optimizer.lr=0.5", "--data.seed=3")


@pytest.mark.parametrize("verb", ["fit", "validate", "export"])
@pytest.mark.parametrize("fault", ["shape", "missing", "unknown"])
def test_weights_of_another_network_are_one_line(temper, first, tmp_path, capsys, verb, fault):
    state = _state(_last(first))
    del state["settings"]  # as a run in Python leaves it
    weights = state["state_dict"]
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    if fault == "shape":
        weights[name] = weights[name][:-1]
    elif fault == "missing":
        del weights[name]
    else:
        weights["network.other"] = torch.zeros(1)
    path = tmp_path / "other.ckpt"
    torch.save(state, path)
    words = (f"--ckpt_path={path}", "--trainer.max_steps=4")
    line = _refused(capsys, lambda: temper(verb, tmp_path / "run", *words))
    assert f"ckpt_path={path}: not a checkpoint of this network" in line
    assert ("other" if fault == "unknown" else name.removeprefix("network.")) in line


@pytest.mark.parametrize(
    ("key", "value", "verbs"),
    [
        ("tokenizer_sha256", "0" * 64, ["fit", "validate"]),
        ("data_sha256", {"instruct": "0" * 64}, ["fit"]),
    ],
)
def test_files_that_changed_are_refused(temper, first, tmp_path, capsys, key, value, verbs):
    state = _state(_last(first))
    assert state[key] != value
    torch.save(state | {key: value}, tmp_path / "other.ckpt")
    words = (f"--ckpt_path={tmp_path / 'other.ckpt'}", "--trainer.max_steps=4")
    for verb in verbs:
        line = _refused(capsys, lambda verb=verb: temper(verb, tmp_path / "run", *words))
        assert key in line and "0000" in line


# -- an evaluation of a run


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_an_evaluation_of_a_run_is_of_its_export(command_line, run, capsys, verb):
    before = _contents(run)
    command_line(verb, f"--config={run / 'config.yaml'}")
    assert f"{verb}: the export of this run, {run / 'export'}" in capsys.readouterr().err
    assert _contents(run) == before
    written = json.loads((run / verb / "evaluation.json").read_text())
    assert written["metrics"] == json.loads(before["evaluation.json"])["metrics"]
    saved = yaml.safe_load((run / verb / f"config_{verb}.yaml").read_text())
    assert saved["model"]["init_args"]["network"]["path"] == str(run / "export")
    assert {"generations.jsonl", f"metrics_{verb}.csv", ".lock"} <= set(_contents(run / verb))


@pytest.mark.parametrize("merge", ["true", "false"])
def test_a_run_with_an_adapter_is_evaluated_with_it(temper, command_line, first, tmp_path, merge):
    lora = ("--model.network.lora={rank: 2, alpha: 64}", "--model.optimizer.lr=0.1")
    run = tmp_path / "run"
    words = (f"--trainer.callbacks.merge={merge}", *SAVER, *THREE, *lora)
    temper("fit", run, *words, model=first / "export")
    assert (run / "export" / "adapter_config.json").exists() == (merge == "false")
    trained = (run / "generations.jsonl").read_text()
    assert trained != (first / "generations.jsonl").read_text()
    command_line("validate", f"--config={run / 'config.yaml'}")
    assert (run / "validate" / "generations.jsonl").read_text() == trained
    shutil.rmtree(run / "export")
    command_line("validate", f"--config={run / 'config.yaml'}")
    assert (run / "validate" / "generations.jsonl").read_text() == trained


@pytest.mark.parametrize("merge", ["true", "false"])
def test_a_reference_without_the_adapter_is_of_the_fit(
    temper, command_line, first, tmp_path, merge
):
    """The export of a run has no new adapter, and an evaluation needs no reference."""
    run = tmp_path / "run"
    words = (
        "--config=configs/objective/dpo.yaml",
        f"--model.network.path={first / 'export'}",
        "--model.network.lora.rank=2",
        "--model.reference=adapter_off",
        "--data=SyntheticPreference",
        "--data.n_pairs=8",
        "--data.batch_size=4",
        f"--trainer.callbacks.merge={merge}",
    )
    temper("fit", run, *THREE, *words, model=first / "export")
    command_line("validate", f"--config={run / 'config.yaml'}")
    rows = [(folder / "generations.jsonl").read_text() for folder in (run, run / "validate")]
    assert rows[0] == rows[1]


def test_a_prediction_of_a_run_is_of_its_export(command_line, run):
    before = _contents(run)
    command_line("predict", f"--config={run / 'config.yaml'}")
    rows = [json.loads(line) for line in (run / "predict" / "answers.jsonl").open()]
    trained = [json.loads(line) for line in before["generations.jsonl"].decode().splitlines()]
    assert [row["response"] for row in rows] == [row["response"] for row in trained]
    assert _contents(run) == before


def test_a_folder_of_its_own_changes_no_weights(command_line, run, tmp_path, capsys):
    words = (f"--config={run / 'config.yaml'}", f"--trainer.default_root_dir={tmp_path / 'own'}")
    command_line("validate", *words)
    assert "the export of this run" in capsys.readouterr().err
    assert (tmp_path / "own" / "evaluation.json").exists() and not (run / "validate").exists()


@pytest.mark.parametrize("why", ["no export", "a later fit began"])
def test_without_an_export_it_is_of_last(command_line, run, capsys, why):
    if why == "no export":
        shutil.rmtree(run / "export")
    else:
        os.utime(run / "export", (1, 1))
    command_line("validate", f"--config={run / 'config.yaml'}")
    assert f"the last checkpoint of this run, {_last(run)}" in capsys.readouterr().err
    found, trained = (
        json.loads((folder / "evaluation.json").read_text()) for folder in (run / "validate", run)
    )
    assert found["metrics"] == trained["metrics"]


@pytest.mark.parametrize("verb", ["validate", "export"])
def test_an_untrained_network_is_not_taken_for_a_run(command_line, run, capsys, verb):
    shutil.rmtree(run / "checkpoints")
    if verb == "validate":
        shutil.rmtree(run / "export")
    line = _refused(capsys, lambda: command_line(verb, f"--config={run / 'config.yaml'}"))
    assert str(run / "config.yaml") in line and "--ckpt_path" in line
    assert verb == "validate" or str(run / "export") in line


def test_an_evaluation_elsewhere_in_a_run_keeps_metrics(temper, run):
    before = (run / "metrics.csv").read_text()
    for verb in ("validate", "predict"):
        temper(verb, run, model=run / "export")
        assert (run / "metrics.csv").read_text() == before


# -- the card


def test_a_card_lists_every_segment(temper, run):
    once = json.loads((run / "card.json").read_text())
    assert len(once["segments"]) == 1
    words = ("--trainer.max_steps=5", "--trainer.val_check_interval=5")
    temper("fit", run, *SAVER, *words, f"--ckpt_path={_last(run)}")
    card = json.loads((run / "card.json").read_text())
    one, other = card["segments"]
    steps = [(each["first_step"], each["last_step"]) for each in (one, other)]
    assert steps == [(0, 3), (3, 5)] and card["cost"]["steps"] == 5
    assert other["resumed_from"] == str(_last(run)) and one["resumed_from"] is None
    for key in ("seconds", "evaluation_seconds"):
        assert card["cost"][key] == pytest.approx(one[key] + other[key], abs=2e-3)
        assert one[key] > 0 and other[key] > 0
    assert card["cost"]["passes"] == 5 and one["devices"] == 1 and one["versions"]["torch"]
