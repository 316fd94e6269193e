"""Plugins, processes and resuming inside a SLURM job."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.trainer.states import TrainerStatus

from temper.cli.slurm import cluster_plugins, resumed_from
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


@pytest.fixture
def left(tmp_path) -> Path:
    """A run folder of a preempted job."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "hpc_ckpt_2.ckpt").touch()
    return tmp_path


def test_a_job_resumes_from_the_newest_checkpoint(left):
    assert resumed_from(left, CONFIG) == left / "hpc_ckpt_2.ckpt"
    (left / "hpc_ckpt_10.ckpt").mkdir()
    (left / ".hpc_ckpt_11.ckpt.1234").touch()  # half written
    assert (
        resumed_from(left, CONFIG.replace("max_steps: 5", "max_steps: 9"))
        == left / "hpc_ckpt_10.ckpt"
    )
    assert [path.name for path in preempted_checkpoints(left)] == [
        "hpc_ckpt_2.ckpt",
        "hpc_ckpt_10.ckpt",
    ]
    assert next_checkpoint(left).name == "hpc_ckpt_11.ckpt"


def test_a_job_without_a_checkpoint_begins_anew(tmp_path):
    assert (
        resumed_from(tmp_path / "none", CONFIG) is None
        and next_checkpoint(tmp_path).name == "hpc_ckpt_1.ckpt"
    )


def test_a_class_that_was_renamed_is_the_same_training(left):
    saved = "data: {judge: {class_path: temper.judges.yes_no.YesNoLM}}"
    (left / "config.yaml").write_text(saved)
    now = "data: {judge: {class_path: temper.judges.YesNoLM}}"
    assert resumed_from(left, now) == left / "hpc_ckpt_2.ckpt"


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [("lam: 1.0", "lam: 2.0", "model.init_args.lam=1.0"), ("n: 3", "m: 3", "data.init_args.n=3")],
)
def test_a_job_does_not_resume_from_another_training(left, old, new, name):
    with pytest.raises(TemperError, match="delete it to start from scratch") as refusal:
        resumed_from(left, CONFIG.replace(old, new))
    assert name in str(refusal.value) and "hpc_ckpt_2.ckpt" in str(refusal.value)


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
