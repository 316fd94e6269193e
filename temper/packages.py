"""Optional packages: whether they are installed, and the command that installs them.

An optional package is imported where it is used. Whoever needs one that is missing raises its own
error, which names the flag, and takes the rest of the line from `install_hint`.
"""

import importlib.util
from importlib.metadata import PackageNotFoundError, version

from temper.errors import TemperError

# Module -> what pip has to install: an extra of pyproject.toml where there is one.
REQUIREMENTS = {
    "bitsandbytes": "-e '.[bitsandbytes]'",
    "comet_ml": "comet-ml",
    "datasets": "-e '.[data]'",
    "deepspeed": "-e '.[deepspeed]' -c constraints.txt",
    "flash_attn": "flash-attn",
    "gguf": "-e '.[gguf]'",
    "lm_eval": "-e '.[lm-eval]'",
    "mlflow": "-e '.[mlflow]'",
    "neptune": "neptune",
    "pyarrow": "-e '.[data]'",
    "snakemake_executor_plugin_slurm": "-e '.[slurm]' -c constraints.txt",
    "tensorboard": "tensorboard",
    "wandb": "-e '.[wandb]'",
}
# The ZeRO weight spaces read and write attributes of DeepSpeed's optimizers that are not public:
# strategies/zero.py lists them.
DEEPSPEED = "0.19."


def is_installed(module: str) -> bool:
    """Whether a top-level module can be imported; it is not imported."""
    return importlib.util.find_spec(module) is not None


def installed_version(package: str) -> str:
    """Version of a package by its name on the package index, or ``not installed``: for cards."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def install_command(module: str) -> str:
    """The pip command that installs the package of a module.

    Args:
        module: Import name, such as ``lm_eval``; of a submodule, the first part counts.
    """
    name = module.partition(".")[0]
    return f"pip install {REQUIREMENTS.get(name, name)}"


def install_hint(module: str) -> str:
    """That a package is not installed, and the command that installs it: the end of an error.

    Args:
        module: As for `install_command`.
    """
    name = module.partition(".")[0].replace("_", "-")
    return f"the package {name} is not installed: {install_command(module)}"


def check_deepspeed() -> None:
    """Refuse to go on without a supported version of DeepSpeed.

    Raises:
        TemperError: with the command that installs one.
    """
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise TemperError(f"trainer.strategy: {install_hint('deepspeed')}, or use fsdp2") from None
    if not found.startswith(DEEPSPEED):
        raise TemperError(
            f"trainer.strategy: DeepSpeed {found} is installed, and the supported version is"
            f" {DEEPSPEED}*, whose internals the ZeRO weight spaces use:"
            f" {install_command('deepspeed')}, or use fsdp2"
        )
