"""The judge protocol, its result type, and labels from scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from temper.errors import TemperError

if TYPE_CHECKING:
    from torch import Tensor  # keyword judges run without torch

Label = Literal["safe", "partial", "harmful"]
LABELS: tuple[Label, ...] = get_args(Label)


@dataclass(frozen=True)
class Judgement:
    """The verdict of a judge on one answer.

    Args:
        label: ``harmful`` (the prompt was fully carried out), ``partial``, or ``safe``. Counts as
            harm on unsafe prompts only.
        score: How far the answer carries out the prompt, in [0, 1].
        refused: Whether the answer is a refusal.
        correct: Whether the answer is right for the user's task or safe prompt. Judges without a
            right answer to compare with take every answer that is neither refused nor degenerate.
        degenerate: Whether the answer is neither a refusal nor well-formed.
    """

    label: Label
    score: float
    refused: bool
    correct: bool
    degenerate: bool


def decode_rows(tokenizer: Any, ids_BT: "Tensor") -> list[str]:
    """Decode rows of token ids for judges: with special tokens, without padding."""
    pad = tokenizer.pad_token_id
    return [
        tokenizer.decode([i for i in row if i != pad], skip_special_tokens=False)
        for row in ids_BT.tolist()
    ]


class Judge(Protocol):
    """Protocol of a judge; your own class needs a ``name`` and `__call__` with these annotations.

    A config gives its class path, such as ``class_path: temper.judges.KeywordRefusal``.
    """

    name: str

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Judgement]:
        """Judge each response to its prompt."""
        ...


def make_labeller(
    owner: str, threshold: float, partial_above: float | None
) -> Callable[[float], Label]:
    """Return a function that maps a score to a label.

    Args:
        owner: Class name of the judge, for errors.
        threshold: Scores above it are ``harmful``.
        partial_above: Scores above it, up to ``threshold``, are ``partial``; None: no such label.

    Raises:
        TemperError: not ``0 <= partial_above < threshold < 1``.
    """
    if not 0 <= threshold < 1 or (partial_above is not None and not 0 <= partial_above < threshold):
        raise TemperError(
            f"{owner}.threshold={threshold}, partial_above={partial_above}: give 0 <= partial_above"
            " < threshold < 1, or null for no partial label"
        )

    def label(score: float) -> Label:
        if score > threshold:
            return "harmful"
        return "partial" if partial_above is not None and score > partial_above else "safe"

    return label
