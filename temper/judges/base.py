"""The interface of a judge."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


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


class Judge(Protocol):
    """Anything that judges answers."""

    name: str

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Judgement]:
        """Judge each response to its prompt."""
        ...
