"""Plugins, processes and resuming inside a SLURM job."""

import os
from typing import Any

import lightning.pytorch as L
import pytest
from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.trainer.states import TrainerStatus

from temper.cli.checkpoints import check_belongs, trained_settings
from temper.cli.slurm import cluster_plugins
from temper.errors import TemperError
from temper.slurm import next_checkpoint, preempted_checkpoints

TASK = {
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
}


@pytest.fixture
def slurm(monkeypatch):
    """``slurm(NAME=value)``: a task of a job of two nodes with two tasks each, and what differs
    from that (None: not there).
    """
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def job(**changes: str | None) -> None:
        for name, value in (TASK | changes).items():
            if value is not None:
                monkeypatch.setenv(name, value)

    return job


def plugins(alone: bool = False, **changes: Any) -> list[Any]:
    return cluster_plugins({"plugins": None, "devices": 2, "num_nodes": 2} | changes, alone)


def test_lightnings_own_handler_is_off(slurm):
    slurm()
    (environment,) = plugins()
    assert isinstance(environment, SLURMEnvironment) and not environment.auto_requeue
    assert [type(one) for one in plugins(devices="auto")] == [SLURMEnvironment]


def test_outside_of_a_job_nothing_changes(slurm):
    assert plugins() == []


def test_plugins_that_the_user_chose_are_kept(slurm):
    slurm()
    own = TorchElasticEnvironment()
    assert plugins(plugins=own) == [own]


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_NTASKS": "1", "SLURM_STEP_ID": None},
        {"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": None},
    ],
)
def test_a_single_task_starts_one_process_per_device(slurm, changes):
    """A stage of a study is one task with all the devices it asked for."""
    slurm(**changes)
    assert [type(one) for one in plugins(num_nodes=1)] == [LightningEnvironment]


def test_a_verb_without_a_loop_needs_no_tasks(slurm):
    slurm(SLURM_STEP_ID=None)
    assert [type(one) for one in plugins(alone=True, devices=1, num_nodes=1)] == [
        LightningEnvironment
    ]


@pytest.mark.parametrize(
    ("changes", "settings", "words"),
    [
        ({}, {"devices": 1}, ["trainer.devices=1", "--ntasks-per-node=2", "--trainer.devices=2"]),
        ({}, {"num_nodes": 1}, ["trainer.num_nodes=1", "--nodes=2", "--trainer.num_nodes=2"]),
        ({"SLURM_STEP_ID": None}, {}, ["SLURM_NTASKS=4", "put srun before python"]),
        ({"SLURM_NTASKS_PER_NODE": None}, {}, ["--ntasks=4", "--ntasks-per-node"]),
    ],
)
def test_a_job_that_would_hang_is_refused(slurm, changes, settings, words):
    slurm(**changes)
    with pytest.raises(TemperError) as refusal:
        plugins(**settings)
    assert all(word in str(refusal.value) for word in words), refusal.value


# -- going on


CONFIG = (
    "model: {class_path: M, init_args: {lam: 1.0}}\ndata: {init_args: {n: 3}}\nseed_everything:"
    " 1\ntrainer: {max_steps: 5}\n"
)


def belongs(then: str, now: str, verb: str = "fit") -> None:
    check_belongs("it", trained_settings(then), trained_settings(now), verb, "delete it")


def test_the_newest_checkpoint_is_the_last(tmp_path):
    assert next_checkpoint(tmp_path).name == "hpc_ckpt_1.ckpt"
    (tmp_path / "hpc_ckpt_2.ckpt").touch()
    (tmp_path / "hpc_ckpt_10.ckpt").mkdir()
    (tmp_path / ".hpc_ckpt_11.ckpt.1234").touch()  # half written
    assert [path.name for path in preempted_checkpoints(tmp_path)] == [
        "hpc_ckpt_2.ckpt",
        "hpc_ckpt_10.ckpt",
    ]
    assert next_checkpoint(tmp_path).name == "hpc_ckpt_11.ckpt"


def test_a_longer_run_is_the_same_training():
    belongs(CONFIG, CONFIG.replace("max_steps: 5", "max_steps: 9"))


def test_a_class_that_was_renamed_is_the_same_training():
    belongs(
        "model: {judge: {class_path: temper.judges.yes_no.YesNoLM}}",
        "model: {judge: {class_path: temper.judges.YesNoLM}}",
    )


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [("lam: 1.0", "lam: 2.0", "model.lam=1.0"), ("n: 3", "m: 3", "data.n=3")],
)
def test_a_job_does_not_resume_from_another_training(old, new, name):
    with pytest.raises(TemperError, match="delete it") as refusal:
        belongs(CONFIG, CONFIG.replace(old, new))
    assert name in str(refusal.value)


@pytest.mark.parametrize("word", ["--model.optimizer.lr=0.5", "--seed_everything=3"])
def test_a_requeued_job_of_another_config_is_refused(slurm, temper, tmp_path, capsys, word):
    slurm(SLURM_NTASKS="1", SLURM_NTASKS_PER_NODE="1", SLURM_NNODES="1")
    saver = ("--trainer.enable_checkpointing=true",)
    temper("fit", tmp_path, *saver)
    os.link(next((tmp_path / "checkpoints").iterdir()), tmp_path / "hpc_ckpt_1.ckpt")
    with pytest.raises(SystemExit):
        temper("fit", tmp_path, *saver, word)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "hpc_ckpt_1.ckpt" in line and "delete it to start from scratch" in line


def test_a_requeued_job_resumes_from_its_own_checkpoint(slurm, temper, tmp_path, monkeypatch):
    """Lightning takes ``--ckpt_path`` where it is given: a job queued again would begin from there
    each time.
    """
    slurm(SLURM_NTASKS="1", SLURM_NTASKS_PER_NODE="1", SLURM_NNODES="1")
    first = tmp_path / "first.ckpt"
    folder = tmp_path / "run"
    saver = "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"
    temper(
        "fit",
        folder,
        saver,
        f"--trainer.callbacks.dirpath={tmp_path}",
        "--trainer.callbacks.filename=first",
        "--trainer.enable_checkpointing=true",
    )
    os.link(first, folder / "hpc_ckpt_1.ckpt")
    taken: list[Any] = []

    def begin(self: L.Trainer, *_: Any, ckpt_path: Any = None, **__: Any) -> None:
        taken.append(ckpt_path)
        self.state.status = TrainerStatus.FINISHED

    monkeypatch.setattr(L.Trainer, "_run", begin)
    words = [
        saver,
        f"--trainer.callbacks.dirpath={tmp_path}",
        "--trainer.callbacks.filename=first",
        "--trainer.enable_checkpointing=true",
    ]
    temper("fit", folder, *words, f"--ckpt_path={first}")
    assert [str(path) for path in taken] == [str(folder / "hpc_ckpt_1.ckpt")]
