"""Cross-field checks: everything that can be refused before a model is built, in one place."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from temper.errors import TemperError, did_you_mean
from temper.models.folder import FLAG, NetworkSpec
from temper.models.load import check_network
from temper.packages import check_deepspeed
from temper.plan.memory import STRATEGIES
from temper.sharded_checkpoint import COMMON, Parts, is_in_parts, load_file

CLASSES = {
    "SingleDeviceStrategy": "auto",
    "DDPStrategy": "ddp",
    "FSDP2Strategy": "fsdp2",
}  # short names of strategies given by class
IN_PARTS = ("fsdp2", "zero1", "zero2", "zero3")  # weights or optimizer state are cut over ranks


def check_config(config: Any, verb: str) -> None:
    """Run every check on the config of a verb.

    Raises:
        TemperError: the first thing that cannot be honoured, with the way out.
    """
    for check in CHECKS:
        check(config, verb)


def check_environment(known: Iterable[str]) -> None:
    """Refuse ``TEMPER_*`` variables that no option reads, which would be ignored without a word.

    Raises:
        TemperError: naming the variable and the closest one that exists.
    """
    known = set(known)
    for name in sorted(os.environ):
        if name.startswith("TEMPER_") and name not in known:
            hint = did_you_mean(name, known, "give it as a flag")
            raise TemperError(
                f"environment variable {name} is read by no option (arguments of classes have"
                f" none); {hint}"
            )


def _clipping(config: Any, verb: str) -> None:
    value = config.trainer.gradient_clip_val
    if value is not None:
        raise TemperError(
            f"trainer.gradient_clip_val={value} cannot be honoured: objectives step the optimizer"
            f" themselves; use --model.init_args.max_grad_norm={value}"
        )
    if config.trainer.gradient_clip_algorithm is not None:
        raise TemperError(
            f"trainer.gradient_clip_algorithm={config.trainer.gradient_clip_algorithm} cannot be"
            " honoured: clipping is by norm; use --model.init_args.max_grad_norm"
        )


def _accumulation(config: Any, verb: str) -> None:
    value = config.trainer.accumulate_grad_batches
    if value != 1:
        raise TemperError(
            f"trainer.accumulate_grad_batches={value} cannot be honoured: a mean of means is not"
            " the mean over tokens; set the batch size of the data to the whole batch and use"
            " --model.init_args.micro_batch_size for what fits at once"
        )


def _precision(config: Any, verb: str) -> None:
    if str(config.trainer.precision) in ("16", "16-mixed", "16-true"):
        raise TemperError(
            f"trainer.precision={config.trainer.precision} cannot be honoured: there is no loss"
            " scaling between the passes; use bf16-mixed or 32-true"
        )


def strategy_name(strategy: Any) -> str:
    """Short name of what ``trainer.strategy`` says: a name, or a class with arguments (its own name
    where it has no short one).
    """
    if isinstance(strategy, str):
        return strategy
    path = str(strategy.get("class_path", ""))
    kind = path.rpartition(".")[2]
    stage = (strategy.get("init_args") or {}).get("stage", 2)
    return f"zero{stage}" if kind == "ZeROStrategy" else CLASSES.get(kind, path)


def _strategy(config: Any, verb: str) -> None:
    strategy = config.trainer.strategy
    if isinstance(strategy, str) and not (strategy in STRATEGIES or strategy.startswith("ddp_")):
        accepted = f"accepted: {', '.join(STRATEGIES)}"
        hint = did_you_mean(strategy.replace("deepspeed_stage_", "zero"), STRATEGIES, accepted)
        raise TemperError(f"trainer.strategy={strategy}: no weight space is written for it; {hint}")


def _in_parts(config: Any, verb: str) -> None:
    """What cannot be had where weights or optimizer state are cut over ranks."""
    strategy = config.trainer.strategy
    name = strategy_name(strategy)
    if name not in IN_PARTS or verb != "fit":
        return
    if name.startswith("zero"):
        options = {} if isinstance(strategy, str) else strategy.get("init_args") or {}
        if options.get("offload_parameters") and name != "zero3":
            raise TemperError(
                f"trainer.strategy.init_args.offload_parameters=true: {name} keeps all weights on"
                " every device; set stage=3, or drop it"
            )
    plugins = config.trainer.plugins or []
    for plugin in plugins if isinstance(plugins, list) else [plugins]:
        if "CheckpointIO" in str(plugin):
            raise TemperError(
                f"trainer.plugins: {name} writes checkpoints in parts by itself, and {plugin} would"
                " be ignored; drop it"
            )
    arguments = config.model.get("init_args") or {}
    network = arguments.get("network") or {}
    if network.get("quantization") and name in ("fsdp2", "zero3"):
        raise TemperError(
            f"{FLAG}.quantization={network['quantization']}: weights in few bits cannot be cut by"
            f" {name}; use ddp, zero1 or zero2"
        )
    optimizer = str((arguments.get("optimizer") or {}).get("class_path", ""))
    if optimizer.startswith("bitsandbytes."):
        raise TemperError(
            f"model.init_args.optimizer={optimizer}: its state is not shaped like the weights, and"
            f" {name} cuts it as they are cut; use torch.optim.AdamW, or ddp"
        )
    if name.startswith("zero"):
        check_deepspeed()


def _network(config: Any, verb: str) -> None:
    arguments = config.model.get("init_args") or {}
    if "network" in arguments:
        network = arguments["network"]
        check_network(
            NetworkSpec(
                **{field.name: network[field.name] for field in dataclasses.fields(NetworkSpec)}
            )
        )


def check_checkpoint(path: str | None) -> None:
    """Refuse a checkpoint that holds more than tensors and plain values, before anything else reads
    it.

    Raises:
        TemperError: reading it would call functions that a file names; or a part of it is missing
            or damaged.
    """
    if path is None:
        return
    if is_in_parts(path):
        load_file(Path(path) / COMMON)
        Parts(Path(path))
    elif Path(path).is_file():
        load_file(Path(path))


def _checkpoint(config: Any, verb: str) -> None:
    if config.get("weights_only") is False:
        raise TemperError(
            "weights_only=false cannot be honoured: reading a checkpoint of more than tensors and"
            " plain values can run any code, and Temper writes none; drop it"
        )
    path = config.get("ckpt_path")
    if path and path.endswith(".ckpt") and not Path(path).exists():
        raise TemperError(
            f"ckpt_path={path}: no such checkpoint; give one that exists, or drop the flag to begin"
            " anew"
        )


CHECKS: tuple[Callable[[Any, str], None], ...] = (
    _clipping,
    _accumulation,
    _precision,
    _strategy,
    _in_parts,
    _network,
    _checkpoint,
)
