"""From a config to the setup that `temper.plan` computes with, without device, weights or rows."""

from typing import Any

from temper.cli.checks import strategy_name
from temper.errors import TemperError
from temper.plan import Plan, Setup, make_plan
from temper.plan.memory import STRATEGIES, measure_state_bytes
from temper.plan.report import Device
from temper.plan.shapes import find_architecture, model_shape

# Lightning's names of the precisions that objectives have.
PRECISIONS = {
    name: full
    for full, names in {
        "32-true": ("None", "32", "32-true"),
        "bf16-mixed": ("bf16", "bf16-mixed"),
        "bf16-true": ("bf16-true",),
    }.items()
    for name in names
}
# Arguments of strategies that a plan depends on.
ARGUMENTS = ("gather_dtype", "offload_optimizer", "offload_parameters", "bucket_size")


def plan_of(
    module: Any,
    data: Any,
    given: Any,
    device: Device,
    sequence_length: int | None,
    devices_total: int | None,
) -> Plan:
    """The plan of a run.

    Args:
        module: The objective.
        data: The data if they can be built without files; else any datamodule.
        given: The config, before a verb changed it.
        device: Memory and speed of a device.
        sequence_length: Tokens in a row; None: the data's limit.
        devices_total: Number of devices; None: the Trainer's.

    Raises:
        TemperError: a setting for which there is no estimate, or one that is missing.
    """
    if not hasattr(module, "cost"):
        raise TemperError(
            f"model={type(module).__name__} does not say what a step costs: a plan is for"
            " objectives that train a network"
        )
    spec = module.network_spec
    arguments = given.data.get("init_args") or {}
    found = find_architecture(spec, _vocabulary(data, arguments))
    cost = module.cost()
    devices = _devices(given.trainer) if devices_total is None else devices_total
    strategy, options = _strategy(given.trainer.strategy, devices)
    setup = Setup(
        strategy=strategy,
        devices=devices,
        sequence_length=_length(data, arguments) if sequence_length is None else sequence_length,
        batch_sizes=_batch_sizes(arguments, [each.stream for each in cost.passes]),
        micro_batch_size=module.micro_batch_size,
        precision=_precision(given.trainer.precision),
        dtype=spec.dtype,
        quantization=spec.quantization,
        lora=spec.lora or found.adapter,
        activation_checkpointing=spec.activation_checkpointing,
        attention=spec.attention,
        fused_loss=module.fused_loss,
        on_cpu=given.trainer.accelerator == "cpu",
        **options,
    )
    state = measure_state_bytes(module.optimizer_factory) if cost.optimizer else 0.0
    if not STRATEGIES[strategy].master_weights:  # the state has the dtype of the trained weights
        state *= setup.trained_bytes / 4 if state >= 4 else 1
    setup = Setup(**{**vars(setup), "state_bytes": state})
    return make_plan(type(module).__name__, model_shape(found), setup, cost, device)


def _vocabulary(data: Any, arguments: Any) -> int | None:
    """Number of tokens of the data's tokenizer; None if the data name none."""
    if hasattr(data, "tokenizer"):
        return len(data.tokenizer)
    if not arguments.get("tokenizer"):
        return None
    from temper.data.tokenizer import load_tokenizer

    return len(load_tokenizer(arguments["tokenizer"]))


def _length(data: Any, arguments: Any) -> int:
    """Tokens in the longest row of the data."""
    language = getattr(data, "language", None)
    if language is not None:
        return int(language.spec.prompt_length + language.spec.response_length)
    if arguments.get("max_length"):
        return int(arguments["max_length"])
    raise TemperError(
        "--sequence_length: these data have no limit of their own; give the tokens in a row"
    )


def _batch_sizes(arguments: Any, streams: list[str | None]) -> dict[str | None, int]:
    """Rows per step of every stream: ``harmful_batch_size`` for ``harmful`` and ``harmful_pairs``,
    ``batch_size`` for others.
    """
    if arguments.get("batch_size") is None:
        raise TemperError(
            "data: they have no batch_size, which says how many rows a step has; a plan needs it"
        )
    found: dict[str | None, int] = {None: int(arguments["batch_size"])}
    for stream in filter(None, streams):
        own = [f"{word}_batch_size" for word in reversed(stream.split("_"))]
        found[stream] = int(
            next((arguments[name] for name in own if arguments.get(name) is not None), found[None])
        )
    return found


def _devices(trainer: Any) -> int:
    """Devices of the Trainer, over all nodes."""
    given = trainer.devices
    words = given.split(",") if isinstance(given, str) and "," in given else given
    if isinstance(words, list):
        return len(words) * int(trainer.num_nodes)
    if str(words) in ("auto", "-1"):
        if trainer.accelerator == "cpu":
            return int(trainer.num_nodes)
        raise TemperError(
            f"trainer.devices={given}: the number is not known before the run; give"
            " --devices_total=8, for example"
        )
    return int(words) * int(trainer.num_nodes)


def _strategy(strategy: Any, devices: int) -> tuple[str, dict[str, Any]]:
    """A key of `STRATEGIES`, and the strategy's own options."""
    given = {} if isinstance(strategy, str) else strategy.get("init_args") or {}
    options = {option: given[option] for option in ARGUMENTS if given.get(option) is not None}
    name = strategy_name(strategy)
    if (name == "auto" and devices > 1) or name.startswith("ddp"):
        name = "ddp"  # the first as Lightning chooses
    if name not in STRATEGIES:
        raise TemperError(
            f"trainer.strategy={name}: no plan is known for it; choose one of"
            f" {', '.join(STRATEGIES)}"
        )
    return name, options


def _precision(precision: Any) -> str:
    if str(precision) not in PRECISIONS:
        raise TemperError(
            f"trainer.precision={precision}: not supported by the objectives; use 32-true,"
            " bf16-mixed or bf16-true"
        )
    return PRECISIONS[str(precision)]
