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
        # Many have plain numbers (attention_dropout, dropout, hidden_dropout, attn_dropout_p, ...) and call the function.
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
