"""Checks of settings across fields: invalid ones are refused before a model is built."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any

from temper.errors import TemperError, did_you_mean
from temper.models.folder import FLAG, NetworkSpec
from temper.models.load import check_network
from temper.packages import check_deepspeed
from temper.plan.memory import STRATEGIES

SHORT_NAMES = {  # of strategies given by class
    "SingleDeviceStrategy": "auto",
    "DDPStrategy": "ddp",
    "FSDP2Strategy": "fsdp2",
}
SHARDED = ("fsdp2", "zero1", "zero2", "zero3")  # weights or optimizer state are sharded over ranks


def check_config(config: Any, verb: str) -> None:
    """Run every check on the config of a verb.

    Raises:
        TemperError: the first setting that cannot be honoured, with the way out.
    """
    for check in CHECKS:
        check(config, verb)


def check_environment(known: Iterable[str]) -> None:
    """Refuse ``TEMPER_*`` variables that no option reads, which would be ignored silently.

    Args:
        known: Names of the variables that options read.

    Raises:
        TemperError: names the variable and the closest known one.
    """
    known = set(known)
    for name in sorted(os.environ):
        if name.startswith("TEMPER_") and name not in known:
            hint = did_you_mean(name, known, "give it as a flag")
            raise TemperError(
                f"environment variable {name} is read by no option (arguments of classes have"
                f" none); {hint}"
            )


def _check_clipping(config: Any, verb: str) -> None:
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


def _check_accumulation(config: Any, verb: str) -> None:
    value = config.trainer.accumulate_grad_batches
    if value != 1:
        raise TemperError(
            f"trainer.accumulate_grad_batches={value} cannot be honoured: a mean of means is not"
            " the mean over tokens; set the batch size of the data to the whole batch and use"
            " --model.init_args.micro_batch_size for what fits at once"
        )


def _check_precision(config: Any, verb: str) -> None:
    if str(config.trainer.precision) in ("16", "16-mixed", "16-true"):
        raise TemperError(
            f"trainer.precision={config.trainer.precision} cannot be honoured: there is no loss"
            " scaling between the passes; use bf16-mixed or 32-true"
        )


def strategy_name(strategy: Any) -> str:
    """Short name of ``trainer.strategy``, which is a name or a class with arguments; the path of a
    class that has no short name.
    """
    if isinstance(strategy, str):
        return strategy
    path = str(strategy.get("class_path", ""))
    class_name = path.rpartition(".")[2]
    stage = (strategy.get("init_args") or {}).get("stage", 2)
    return f"zero{stage}" if class_name == "ZeROStrategy" else SHORT_NAMES.get(class_name, path)


def _check_strategy(config: Any, verb: str) -> None:
    strategy = config.trainer.strategy
    if isinstance(strategy, str) and not (strategy in STRATEGIES or strategy.startswith("ddp_")):
        accepted = f"accepted: {', '.join(STRATEGIES)}"
        hint = did_you_mean(strategy.replace("deepspeed_stage_", "zero"), STRATEGIES)
        raise TemperError(
            f"trainer.strategy={strategy}: there is no weight space for it;"
            f" {'; '.join(filter(None, (accepted, hint)))}"
        )


def _check_sharding(config: Any, verb: str) -> None:
    """Refuse settings that do not go with sharded weights or optimizer state."""
    strategy = config.trainer.strategy
    name = strategy_name(strategy)
    if name not in SHARDED or verb != "fit":
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
                f"trainer.plugins: {name} writes sharded checkpoints itself, and {plugin} would be"
                " ignored; drop it"
            )
    arguments = config.model.get("init_args") or {}
    network = arguments.get("network") or {}
    if network.get("quantization") and name in ("fsdp2", "zero3"):
        raise TemperError(
            f"{FLAG}.quantization={network['quantization']}: quantized weights cannot be sharded by"
            f" {name}; use ddp, zero1 or zero2"
        )
    optimizer = str((arguments.get("optimizer") or {}).get("class_path", ""))
    if optimizer.startswith("bitsandbytes."):
        raise TemperError(
            f"model.init_args.optimizer={optimizer}: its state is not shaped like the weights, and"
            f" {name} shards it as they are sharded; use torch.optim.AdamW, or ddp"
        )
    if name.startswith("zero"):
        check_deepspeed()


def _check_network(config: Any, verb: str) -> None:
    arguments = config.model.get("init_args") or {}
    if "network" in arguments:
        network = arguments["network"]
        check_network(
            NetworkSpec(
                **{field.name: network[field.name] for field in dataclasses.fields(NetworkSpec)}
            )
        )


def _check_checkpoint_settings(config: Any, verb: str) -> None:
    if config.get("weights_only") is False:
        raise TemperError(
            "weights_only=false cannot be honoured: reading a checkpoint of more than tensors and"
            " plain values can run any code, and Temper writes none; drop it"
        )


CHECKS: tuple[Callable[[Any, str], None], ...] = (
    _check_clipping,
    _check_accumulation,
    _check_precision,
    _check_strategy,
    _check_sharding,
    _check_network,
    _check_checkpoint_settings,
)
