"""How many positions a network was made for."""

from typing import Any

from torch import nn

ROPE = ("rope_parameters", "rope_scaling")  # of a config: rotary positions, possibly stretched


def position_limit(config: Any) -> int | None:
    """Largest number of tokens in a sequence that a network was made for, stretched rotary
    positions included; None where its config has no limit (ALiBi, recurrent networks).

    A sliding window is no limit: positions go on behind it.

    Args:
        config: Of a transformers model.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1 or getattr(text, "alibi", False):
        return None
    longest = limit
    for name in ROPE:
        for rope in _ropes(getattr(text, name, None)):
            factor = rope.get("factor")
            if isinstance(factor, int | float):
                original = rope.get("original_max_position_embeddings") or limit
                longest = max(longest, int(factor * original))
    return longest


def _ropes(settings: Any) -> list[dict[str, Any]]:
    """Settings of rotary positions: one set, or one for every type of layer."""
    if not isinstance(settings, dict):
        return []
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return nested or [settings]


def learns_positions(network: nn.Module, limit: int) -> bool:
    """Whether a network has a table of positions (GPT-2, OPT, ...), which ends at its limit: longer
    sequences are an error, and not only new to it.
    """
    words = network.get_input_embeddings()  # type: ignore[operator]
    return any(
        isinstance(module, nn.Embedding)
        and module is not words
        and limit <= module.num_embeddings <= limit + 8  # OPT's has two more
        for module in network.modules()
    )
