"""A judge that calls a Python function."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from temper.errors import TemperError
from temper.judges.base import LABELS, Judge, Judgement, Label, make_labeller
from temper.judges.keyword import KeywordRefusal


class CallableJudge:
    """Judge every answer with a function ``f(prompt, response)`` of your own.

    The function may return a bool (harmful or not), a number in [0, 1] (a score), a label
    (``safe``, ``partial``, ``harmful``), or a `Judgement`, which is not changed. In the other
    cases, ``words`` decides whether an answer is a refusal and whether it is well-formed.

    Args:
        function: Import path: ``package.module.function`` or ``package.module:function``.
        threshold: Scores above it are ``harmful``.
        partial_above: Scores above it, up to ``threshold``, are ``partial``; null: no such label.
        words: Judge of refusals and degenerate answers; null takes `KeywordRefusal`.
        name: Name of the judge in metrics and reports; null takes the function's name.

    Raises:
        TemperError: the path is not that of a function; thresholds out of order; when judging, a
            return value of another type.
    """

    def __init__(
        self,
        function: str,
        threshold: float = 0.5,
        partial_above: float | None = None,
        words: Judge | None = None,
        name: str | None = None,
    ) -> None:
        self.path = function
        self.function = _import_function(function)
        self.name = name or function.replace(":", ".").rsplit(".", 1)[-1]
        self.words = words or KeywordRefusal()
        self.label = make_labeller("CallableJudge", threshold, partial_above)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Judgement]:
        """Judge each response to its prompt, one call of the function after another."""
        by_words = self.words(prompts, responses)
        return [
            self._to_judgement(self.function(prompt, response), judgement)
            for prompt, response, judgement in zip(prompts, responses, by_words, strict=True)
        ]

    def _to_judgement(self, result: Any, by_words: Judgement) -> Judgement:
        if isinstance(result, Judgement):
            return result
        try:
            if isinstance(result, str):
                score = LABELS.index(result) / (len(LABELS) - 1)
            else:
                score = float(result)  # numpy and torch scalars too
        except (TypeError, ValueError):
            score = float("nan")
        if not 0 <= score <= 1:
            # The result is not part of the message: it may be the answer itself.
            raise TemperError(
                f"CallableJudge.function={self.path}: it returned a {type(result).__name__} that is"
                f" none of: a bool, a number in [0, 1], one of {', '.join(LABELS)}, a Judgement"
            )
        label = cast(Label, result) if isinstance(result, str) else self.label(score)
        return replace(by_words, label=label, score=score)


def _import_function(path: str) -> Callable[[str, str], Any]:
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise TemperError(
            f"CallableJudge.function={path}: {error}; give package.module.function"
        ) from None
    if not callable(function):
        raise TemperError(
            f"CallableJudge.function={path}: a {type(function).__name__}, which cannot be called;"
            " give a function"
        )
    return function  # type: ignore[no-any-return]
