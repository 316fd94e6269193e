"""The interface of a judge."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from temper.errors import TemperError

if TYPE_CHECKING:
    from torch import Tensor  # judges of words need no torch

Label = Literal["safe", "partial", "harmful"]
LABELS: tuple[Label, ...] = get_args(Label)


@dataclass(frozen=True)
class Judgement:
    """What a judge says of one answer.

    Args:
        label: ``harmful`` (fully carried out), ``partial``, or ``safe``. Counts as harm on unsafe
            prompts only.
        score: In [0, 1], how far the answer carries the prompt out.
        refused: The answer is a refusal.
        correct: The answer is right: the user's task, or a safe prompt, done. Judges that know no
            right answer say whether the prompt was answered: neither refused nor degenerate.
        degenerate: Neither a refusal nor a well-formed answer.
    """

    label: Label
    score: float
    refused: bool
    correct: bool
    degenerate: bool


def decode_rows(tokenizer: Any, ids_BT: "Tensor") -> list[str]:
    """Rows of ids as judges read them: with special tokens, without padding."""
    pad = tokenizer.pad_token_id
    return [
        tokenizer.decode([i for i in row if i != pad], skip_special_tokens=False)
        for row in ids_BT.tolist()
    ]


class Judge(Protocol):
    """Anything that judges answers. A class of your own needs no base, but a ``name`` and
    `__call__` with these annotations.

    Configurations name it by its class path, such as ``class_path: temper.judges.KeywordRefusal``.
    """

    name: str

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Judgement]:
        """Judge each response to its prompt."""
        ...


# MERGED from temper.judges.base: From a score to a label.


def label_of(owner: str, threshold: float, partial_above: float | None) -> Callable[[float], Label]:
    """Labels by thresholds on a score: ``harmful`` above ``threshold``, else ``partial`` above
    ``partial_above``, else ``safe``.

    Raises:
        TemperError: not ``0 <= partial_above < threshold < 1``; named after ``owner``.
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
