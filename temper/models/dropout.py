"""Networks without dropout."""

from torch import nn

from temper.errors import TemperError
from temper.models.spec import NetworkSpec


def refuse_lora_dropout(spec: NetworkSpec) -> None:
    """Refuse dropout that a user asked for and that `switch_off_dropout` would take away.

    Raises:
        TemperError: a new adapter with dropout.
    """
    if spec.lora is not None and spec.lora.dropout:
        raise TemperError(
            f"model.init_args.network.lora.dropout={spec.lora.dropout}: preference losses compare two models or two answers, "
            "and dropout would be a difference between them; set it to 0"
        )


def switch_off_dropout(network: nn.Module) -> None:
    """Set every dropout of a network to 0, for good.

    A preference loss compares log-probabilities of two models, or of two answers, and dropout is
    noise in the difference. Not `nn.Module.eval`, which would switch off gradient checkpointing too.
    The network's config keeps its values, so that an export is as it was.
    """
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Attention of Llama's kind has a number and calls the function.
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
