"""Under SLURM: the plugin that assigns ranks."""

import os
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from temper.errors import TemperError
from temper.slurm import in_job


def cluster_plugins(trainer: Any, alone: bool) -> list[Any]:
    """The Trainer's plugins, with SLURM's environment among them.

    Lightning's own handler saves and requeues from inside the signal handler, which can see
    displaced weights and wait for ranks that got no signal: it is switched off, and
    `callbacks.Preemption` does its work between two steps.

    Args:
        trainer: The Trainer's settings.
        alone: Whether the verb runs no loop, so that one process is enough, whatever the job has.

    Raises:
        TemperError: the tasks that SLURM starts are not the devices of the Trainer, or the other
            tasks were not started.
    """
    plugins = trainer["plugins"] or []
    plugins = list(plugins) if isinstance(plugins, list) else [plugins]
    if not in_job() or any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
        return plugins
    if alone or os.environ["SLURM_NTASKS"] == "1":
        # This process starts the others itself, if it has several devices.
        return [*plugins, LightningEnvironment()]
    _check_tasks(trainer)
    return [*plugins, SLURMEnvironment(auto_requeue=False)]


def _check_tasks(trainer: Any) -> None:
    tasks = int(os.environ["SLURM_NTASKS"])
    if "SLURM_STEP_ID" not in os.environ:
        raise TemperError(
            f"SLURM_NTASKS={tasks}, but srun did not start this process, and the other tasks are"
            " not started; put srun before python"
        )
    asked = (
        ("devices", "SLURM_NTASKS_PER_NODE", "--ntasks-per-node"),
        ("num_nodes", "SLURM_NNODES", "--nodes"),
    )
    for option, variable, flag in asked:
        given = os.environ.get(variable)
        wanted = str(trainer[option])
        if given is not None and wanted.isdecimal() and given != wanted:
            raise TemperError(
                f"trainer.{option}={wanted}, but the SLURM job has {flag}={given}; give"
                f" --trainer.{option}={given}, or change the job"
            )
    if "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise TemperError(
            f"the SLURM job has --ntasks={tasks}; say how many tasks each node has:"
            " --ntasks-per-node, one per device"
        )
