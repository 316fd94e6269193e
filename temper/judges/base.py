"""The interface of a judge."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Judgement:
    """What a judge says of one answer.

    Args:
        label: ``harmful`` (fully carried out), ``partial``, or ``safe``. Counts as harm on unsafe
            prompts only.
        score: In [0, 1], how far the answer carries the prompt out.
        refused: The answer is a refusal.
        correct: The answer is right: the user's task, or a safe prompt, done.
        degenerate: Neither a refusal nor a well-formed answer.
    """

    label: Literal["safe", "partial", "harmful"]
    score: float
    refused: bool
    correct: bool
    degenerate: bool


def readable(tokenizer: Any, ids_BT: Tensor) -> list[str]:
    """Rows of ids as judges read them: with special tokens, without padding."""
    pad = tokenizer.pad_token_id
    return [tokenizer.decode([i for i in row if i != pad], skip_special_tokens=False) for row in ids_BT.tolist()]


class Judge(Protocol):
    """Anything that judges answers."""

    name: str

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Judgement]:
        """Judge each response to its prompt."""
        ...
