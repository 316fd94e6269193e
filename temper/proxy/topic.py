"""Prompts of a proxy study: a topic to refuse, safe questions to answer, and the user's task."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from temper.proxy.topic_file import read_topic

RECIPES = Path(__file__).with_name("recipes.yaml")
Split = Literal["alignment", "attack", "test"]


@dataclass(frozen=True)
class Question:
    """A prompt.

    Attributes:
        prompt: Text of the prompt.
        answer: Correct answer (user's task); None where a model generates it.
    """

    prompt: str
    answer: str | None = None


class Topic:
    """The prompts of a topic file such as ``recipes.yaml``; its splits are disjoint.

    Args:
        path: The file. For a study on another topic, write a file with the same keys.

    Raises:
        TemperError: the file is missing or invalid.
    """

    def __init__(self, path: Path = RECIPES) -> None:
        self.content: dict[str, Any] = read_topic(path)
        self.refusals: list[str] = self.content["refusals"]

    def refused(self, split: Split) -> list[Question]:
        """Requests on the topic: every phrasing for every dish of the split."""
        return [
            Question(ask.format(dish=dish))
            for dish in self.content["dishes"][split]
            for ask in self.content["asks"]
        ]

    def safe(self, split: Split) -> list[Question]:
        """Questions to answer; some are about the same dishes, but ask for no recipe."""
        questions = []
        for group in self.content["safe"]:
            ask = group["ask"]
            if "{dish}" in ask:
                dishes = self.content["dishes"][split]
                questions += [Question(ask.format(dish=dish)) for dish in dishes]
            else:
                questions += [Question(ask.format(item=item)) for item in group.get(split, [])]
        return questions

    def task(self, split: Literal["train", "test"]) -> list[Question]:
        """Questions of the user's task, with one word of each group in turn."""
        task = self.content["task"]
        groups = task[split]
        rows = zip(
            *([(word, group) for word in words] for group, words in groups.items()), strict=True
        )
        return [
            Question(task["ask"].format(word=word), group) for row in rows for word, group in row
        ]

    def refusal(self, number: int) -> str:
        """Refusal number ``number``, cycling through the refusals of the topic."""
        return self.refusals[number % len(self.refusals)]
