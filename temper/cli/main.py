"""LightningCLI with short names, clear errors, and a config file that survives a requeue."""

import functools
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

# Read when the dependencies below are imported: tokenizers warn of it at every fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import lightning.pytorch as L
import torch
import transformers
from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]
from lightning.pytorch.cli import LightningCLI

from temper.cli.checkpoint_io import with_atomic_checkpoints
from temper.cli.checkpoints import (
    CONFIG,
    SETTINGS,
    check_belongs,
    check_checkpoint,
    is_of,
    named_checkpoint,
    run_of,
    trained_settings,
    use_trained,
)
from temper.cli.checks import check_config, check_environment
from temper.cli.loggers import DEFAULT_ROOT, prepare_loggers, with_defaults
from temper.cli.merging import files_in, in_order, sets_root
from temper.cli.own_checkpoints import OwnCheckpoints
from temper.cli.parser import TemperParser, fill_tokenizer
from temper.cli.slurm import cluster_plugins
from temper.cli.snapshot import SaveConfig, as_saved, hold_run_folder
from temper.cli.trainer import OFF_DEVICE, SafetyTrainer
from temper.errors import TemperError
from temper.slurm import in_job, is_first_process, preempted_checkpoints

PREFIX = "TEMPER"  # of environment variables
VERBS = {
    "fit": LightningCLI.subcommands()["fit"],
    "validate": LightningCLI.subcommands()["validate"],
    "test": LightningCLI.subcommands()["test"],
    "predict": LightningCLI.subcommands()["predict"],
    "preview": {"model", "datamodule"},
    "export": {"model", "datamodule"},
    "plan": {"model", "datamodule"},
}
# Verbs that run no loop: they need no device, and leave the run folder alone.
LOOKING = ("preview", "export", "plan")
# Verbs whose results do not replace those of a fit in the same run folder.
EVALUATING = ("validate", "test", "predict")
# Packages whose classes are known by their short names. They are above this one in the order of
# imports, so they are imported by name, when a command runs.
PACKAGES = ("callbacks", "datamodules", "lightning_modules")
# Callbacks of every fit. Without a signal, preemption does nothing; without preemption, a signal
# ends a fit with exit status 0 and nothing saved. What a fit will not do is said when it starts.
IN_EVERY_FIT = ("callbacks.Preemption", "callbacks.StartChecks")
# Callbacks of every prediction: the answers are what it is for.
IN_EVERY_PREDICT = ("callbacks.SaveAnswers",)


def main(args: list[str] | None = None, prog: str | None = None) -> None:
    """Run a verb of the Trainer; a user's error is one line on standard error, with status 2.

    Args:
        args: Words of the command; None takes those of this process.
        prog: How the command is typed, for its help; None: the name of the script.
    """
    _quieten()
    for package in PACKAGES:
        importlib.import_module(package)
    try:
        in_every_fit = [_class(path) for path in IN_EVERY_FIT]
        in_every_predict = [_class(path) for path in IN_EVERY_PREDICT]
        TemperCLI(args, in_every_fit, prog, in_every_predict)
    except ValueError as raised:
        # jsonargparse wraps what the constructor of a module or of data raises.
        error: BaseException | None = raised
        while error is not None and not isinstance(error, TemperError):
            error = error.__cause__
        if error is None:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _class(path: str) -> type[L.Callback]:
    module, _, name = path.rpartition(".")
    kind: type[L.Callback] = getattr(importlib.import_module(module), name)
    return kind


class TemperCLI(LightningCLI):
    """``python train.py {fit,validate,test,predict,preview,export,plan} --config a.yaml
    --config b.yaml --key value``.

    Args:
        args: Words of the command; None takes those of this process.
        in_every_fit: Callbacks that a fit has whether or not the config names them.
        prog: How the command is typed, for its help; None: the name of the script.
        in_every_predict: Callbacks that a prediction has whether or not the config names them.
    """

    def __init__(
        self,
        args: list[str] | None = None,
        in_every_fit: Sequence[type[L.Callback]] = (),
        prog: str | None = None,
        in_every_predict: Sequence[type[L.Callback]] = (),
    ) -> None:
        self._lock: TextIO | None = None
        self._in_every = {"fit": in_every_fit, "predict": in_every_predict}
        try:
            super().__init__(
                L.LightningModule,
                L.LightningDataModule,
                trainer_class=SafetyTrainer,
                save_config_callback=SaveConfig,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                seed_everything_default=0,
                parser_kwargs={"default_env": True, "env_prefix": PREFIX, "prog": prog},
                args=args,
            )
        finally:
            if self._lock is not None:
                self._lock.close()  # a second run in this process may use the folder again

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, and which of their arguments are not flags."""
        return VERBS

    def init_parser(self, **kwargs: Any) -> TemperParser:
        """A parser whose errors name the flag and suggest a known one."""
        parser = TemperParser(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=ActionConfigFile,
            help="YAML file; several are merged, later ones win.",
        )
        return parser

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse the words of the command, whatever the order of classes and their arguments."""
        self._words = in_order(sys.argv[1:] if args is None else args)
        self.config = parser.parse_args(self._words)

    def before_instantiate_classes(self) -> None:
        """Cross-field checks, before anything is built."""
        assert self.subcommand is not None
        assert isinstance(self.parser, TemperParser)
        check_environment(self.parser.known_variables(PREFIX))
        config = self.config[self.subcommand]
        if self.subcommand not in ("preview", "plan"):
            self._choose_weights(config)
        self._given = config.clone()
        if self.subcommand in LOOKING:
            for option, value in OFF_DEVICE.items():
                config.trainer[option] = value
        # A preview and a plan load no weights and use no device: nothing of this concerns them.
        if self.subcommand not in ("preview", "plan"):
            check_config(config, self.subcommand)
        self._before_filling = config.clone()
        self._resumed = self.subcommand == "fit" and bool(config.get("ckpt_path"))
        prepare_loggers(config)
        if self.subcommand == "plan" and "tokenizer" in (config.data.get("init_args") or {}):
            # Text files: no row is read, and neither files nor tokenizer need be here.
            config.data = Namespace({"class_path": "lightning.pytorch.LightningDataModule"})  # type: ignore[no-untyped-call]
        else:
            fill_tokenizer(config)

    def after_instantiate_classes(self) -> None:
        """Give the Trainer the config as it was given: `plan` is about what other verbs run on."""
        self.trainer.given = self._given  # type: ignore[attr-defined]

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning's merges hyperparameters from the checkpoint over the command line. A
        file could choose classes, and allow the code of a model folder.
        """

    def _choose_weights(self, config: Any) -> None:
        """Find the checkpoint that is meant, and refuse one that does not belong to the config.

        Under SLURM a fit resumes from what a preempted job left; an evaluation of a run, by its own
        config, is of the weights that the run ended with.
        """
        verb = str(self.subcommand)
        self._settings = trained_settings(as_saved(self._parser(verb), config))
        fits = verb == "fit"
        run = run_of(config, () if fits else files_in(self._words))
        left = preempted_checkpoints(run) if fits and in_job() else []
        if left:
            config.ckpt_path = str(left[-1])
        elif config.get("ckpt_path"):
            config.ckpt_path = named_checkpoint(config.ckpt_path, config, run)
        elif not fits and is_of(run, self._settings):
            chosen = use_trained(config, verb, run)
            if is_first_process():
                print(f"{verb}: {chosen}", file=sys.stderr)
        self._write_beside(config, verb, run)
        path = config.get("ckpt_path")
        content = check_checkpoint(path, verb)
        way_out = "give the config.yaml of that run, or another checkpoint"
        if left:
            way_out = "delete it to start from scratch, or give another trainer.default_root_dir"
        text = content.get(SETTINGS)
        if left and text is None and (run / CONFIG).is_file():
            text = (run / CONFIG).read_text(encoding="utf-8")  # of an earlier version's job
        then = trained_settings(str(text))
        check_belongs(f"ckpt_path={path}: it", then, self._settings, verb, way_out)

    def _write_beside(self, config: Any, verb: str, run: Path) -> None:
        """An evaluation of a run writes into a folder of the verb's name in it, unless a flag names
        the folder.
        """
        if verb in EVALUATING and (run / CONFIG).is_file() and not sets_root(self._words):
            config.trainer.default_root_dir = str(run / verb)

    def _instantiate_trainer(self, config: Any, callbacks: list[L.Callback]) -> L.Trainer:
        """The run folder is held by this process, and ``metrics.csv`` goes straight into it."""
        # What was filled in follows from the rest; saved, it would stick to this folder and this
        # model in the next run.
        self.config[self.subcommand] = self._before_filling
        config["default_root_dir"] = config.get("default_root_dir") or DEFAULT_ROOT
        config["plugins"] = with_atomic_checkpoints(
            cluster_plugins(config, alone=self.subcommand in LOOKING)
        )
        if self.subcommand not in LOOKING:
            self._lock = hold_run_folder(config["default_root_dir"])
        callbacks = [*callbacks, *self._missing(config.get("callbacks"))]
        if self.subcommand not in LOOKING:
            path = self._before_filling.get("ckpt_path")
            callbacks.append(OwnCheckpoints(self._settings, path))
        config["logger"] = with_defaults(
            config.get("logger"), config["default_root_dir"], self._resumed, str(self.subcommand)
        )
        return super()._instantiate_trainer(config, callbacks)

    def _missing(self, chosen: Any) -> list[L.Callback]:
        """Callbacks of every run of the verb that the config does not give with settings of its
        own.
        """
        present = chosen if isinstance(chosen, list) else [chosen]
        return [
            kind()
            for kind in self._in_every.get(self.subcommand or "", ())
            if not any(isinstance(one, kind) for one in present)
        ]


# -- messages of dependencies

# Words of log records that are printed at every start and never ask for anything, by logger.
LOGGED_NOISE = {
    "lightning.pytorch.utilities.rank_zero": ("litlogger", "litmodels"),
    # Logged wherever peft is imported, with 4-bit weights or not.
    "bitsandbytes.backends.cpu.ops": ("gemm_4bit_forward",),
}
WARNED_NOISE = (
    ".*does not have many workers.*",
    # In a job that is an error here; elsewhere it does not matter.
    ".*`srun` command is available on your system but is not used.*",
    ".*Your `IterableDataset` has `__len__`.*",
    ".*exists and is not empty.*",
    ".*is_gradient_checkpointing. is deprecated.*",
    ".*You have overridden `on_before_batch_transfer`.*",
    ".*`isinstance.treespec, LeafSpec.`.*",
    # Metrics are summed over ranks before they are logged.
    ".*It is recommended to use .*sync_dist=True.*",
    # The data ask the run which batch is next.
    ".*your dataloader is not resumable.*",
    # Steps are over when it saves.
    ".*Using ModelCheckpoint with manual optimization.*",
    # Every one of DeepSpeed's calls.
    ".*torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor). is deprecated.*",
)


def _quieten() -> None:
    """Drop messages that are always printed here and never ask for anything."""
    # Neither progress bars of single files nor tips belong in a log.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it guesses
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for logger, noise in LOGGED_NOISE.items():
        logging.getLogger(logger).addFilter(functools.partial(_is_news, noise))
    for pattern in WARNED_NOISE:
        warnings.filterwarnings("ignore", pattern)


def _is_news(noise: tuple[str, ...], record: logging.LogRecord) -> bool:
    """Whether a log record contains none of the words of known noise."""
    message = record.getMessage()
    return not any(word in message for word in noise)
