"""Prompts of a proxy study: a topic to refuse, questions to go on answering, and a user's own
task.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from temper.proxy.topic_file import read_topic

RECIPES = Path(__file__).with_name("recipes.yaml")
Split = Literal["alignment", "attack", "test"]


@dataclass(frozen=True)
class Question:
    """A prompt and what is to be said to it.

    Args:
        prompt: Text.
        answer: Known beforehand for the task; None where a model is to give it.
    """

    prompt: str
    answer: str | None = None


class Topic:
    """The prompts of a topic file such as ``recipes.yaml``; what is trained on and what is tested
    never meet.

    Args:
        path: The file. A study on another topic is another file with the same keys.

    Raises:
        TemperError: it is missing, or not such a file.
    """

    def __init__(self, path: Path = RECIPES) -> None:
        self.content: dict[str, Any] = read_topic(path)
        self.refusals: list[str] = self.content["refusals"]

    def refused(self, split: Split) -> list[Question]:
        """Requests on the topic, every dish of the split asked for in every way."""
        return [
            Question(ask.format(dish=dish))
            for dish in self.content["dishes"][split]
            for ask in self.content["asks"]
        ]

    def safe(self, split: Split) -> list[Question]:
        """Questions to go on answering; some are about the same dishes, without a recipe."""
        return list(self._safe(split))

    def _safe(self, split: Split) -> Iterator[Question]:
        for part in self.content["safe"]:
            if "{dish}" in part["ask"]:
                yield from (
                    Question(part["ask"].format(dish=dish))
                    for dish in self.content["dishes"][split]
                )
            else:
                yield from (Question(part["ask"].format(item=item)) for item in part.get(split, []))

    def task(self, split: Literal["train", "test"]) -> list[Question]:
        """The user's task, groups in turn."""
        task = self.content["task"]
        groups = task[split]
        rows = zip(
            *([(word, group) for word in words] for group, words in groups.items()), strict=True
        )
        return [
            Question(task["ask"].format(word=word), group) for row in rows for word, group in row
        ]

    def refusal(self, number: int) -> str:
        """One of the refusals, in turn."""
        return self.refusals[number % len(self.refusals)]
