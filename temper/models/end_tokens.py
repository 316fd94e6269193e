"""Tokens that end an answer, and answers without them.

Apart from generation, because judging stored answers needs these alone.
"""

from collections.abc import Iterable, Sequence
from typing import Any


def end_tokens(network: Any, further: Iterable[int] = ()) -> list[int]:
    """All tokens that end an answer of a network.

    Args:
        network: A causal LM, or PEFT's wrapper around one; None: only the further ones.
        further: More of them, such as those of a tokenizer and its template; they come first.

    Returns:
        These, then those of the generation config and of the config.
    """
    found = list(further)
    if network is not None:
        config = getattr(network, "config", None)
        ends = _as_list(network.generation_config.eos_token_id)
        own = _as_list(getattr(config, "eos_token_id", None))
        # The default of a config's class is no one's choice: it may be any token of a vocabulary.
        if ends and own == _as_list(getattr(type(config), "eos_token_id", None)):
            own = []
        found += [*ends, *own]
    return list(dict.fromkeys(found))


def cut_at_end(ids: Sequence[int], ends: Iterable[int]) -> list[int]:
    """An answer up to its first end token, without it."""
    ends = set(ends)
    return list(ids[: next((n for n, token in enumerate(ids) if token in ends), len(ids))])


def _as_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
