"""Conversations as a template writes them, with the place of every text in them.

A conversation is rendered twice: with its texts, and with a placeholder for each (kept for later
conversations of the same roles). What stands around the placeholders is the template's own; a text
is all there if the first rendering is the second with the texts filled in. White space at the ends
of a text may be missing, which is noted.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from temper.data.examples import Message
from temper.data.readers import RowError
from temper.data.templates import FLAG, Template
from temper.data.tokenizer import PLACE, PRIVATE, unmark

KEPT = 4096  # renderings with placeholders that are kept
PLACEHOLDER = re.compile(f"{PLACE}(\\d+){PLACE}")
#: Names of a turn's reasoning, as templates and transformers know them.
REASONING_KEYS = ("reasoning_content", "thinking")

# A value of a turn: constants, and numbers of texts.
Value = list[str | int]


def split_reasoning(text: str, tags: tuple[str, str], opened: bool = False) -> list[str] | None:
    """An answer as white space, the opening tag, reasoning, the closing tag, and the rest; None
    if it does not begin with reasoning.

    Args:
        text: The answer.
        tags: Opening and closing tag.
        opened: The prompt ends with the opening tag, so that the answer need not begin with it.
    """
    opening, closing = tags
    rest = text.lstrip()
    if rest.startswith(opening):
        reasoning, found, answer = rest.removeprefix(opening).partition(closing)
        blank = text[: len(text) - len(rest)]
        return [blank, opening, reasoning, closing, answer] if found else None
    reasoning, found, answer = text.partition(closing)
    return ["", "", reasoning, closing, answer] if found and opened else None


@dataclass(frozen=True)
class Piece:
    """A text of a conversation that a template is to write once, whole.

    Args:
        turn: Number of the turn, from 0.
        name: ``content``, ``input`` or ``reasoning``.
        text: The text, control tokens in it marked as text.
    """

    turn: int
    name: str
    text: str


class Conversation:
    """Turns as templates take them, and the texts in them.

    Args:
        messages: The turns.
        tags: Of reasoning; None: there are none.
        quote: Marks control tokens in a text, a list or a dictionary.
        reads_input: Whether the template has a section for a turn's input.
        opened: Prompts end with the opening tag, so that answers need not begin with it.

    Attributes:
        pieces: The texts that are not blank.
        blocks: For each turn, its content as `split_reasoning` splits it, marked; None where it
            holds no reasoning.

    Raises:
        RowError: a text holds a private mark; a turn holds reasoning twice.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        tags: tuple[str, str] | None,
        quote: Callable[[Any], Any],
        reads_input: bool,
        opened: bool = False,
    ) -> None:
        self.messages = messages
        self.pieces: list[Piece] = []
        self.blocks: list[list[str] | None] = []
        self.cacheable = not any(m.tool_calls for m in messages)
        self._turns: list[dict[str, Any]] = []
        for number, message in enumerate(messages):
            _check_private(message, number)
            block = (
                split_reasoning(message.content, tags, opened)
                if tags and message.role == "assistant" and tags[1] in message.content
                else None
            )
            if block and message.reasoning:
                raise RowError(
                    f"turn {number + 1} (assistant) holds reasoning twice, in its content and"
                    " under a key of its own; keep one"
                )
            if block:
                block = [quote(part) if n in (0, 2, 4) else part for n, part in enumerate(block)]
            self.blocks.append(block)
            self._turns.append(self._turn(number, message, block, quote, reads_input))

    def turns(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """The turns with a text for each of `pieces`."""
        return [
            {
                name: "".join(texts[part] if isinstance(part, int) else part for part in value)
                if isinstance(value, list)
                else value[0]
                for name, value in turn.items()
            }
            for turn in self._turns
        ]

    @property
    def shape(self) -> str:
        """Everything but the texts."""
        return repr(self._turns)

    def _turn(
        self,
        number: int,
        message: Message,
        block: list[str] | None,
        quote: Callable[[Any], Any],
        reads_input: bool,
    ) -> dict[str, Any]:
        """A turn with the numbers of its texts; values that are no text in a tuple."""

        def piece(name: str, text: str) -> str | int:
            # A template may ask whether a text is blank, so blank ones stand for themselves.
            if not text.strip():
                return text
            self.pieces.append(Piece(number, name, text))
            return len(self.pieces) - 1

        apart = reads_input and bool(message.input)
        turn: dict[str, Any] = {"role": (message.role,)}
        if block:
            blank, opening, reasoning, closing, answer = block
            turn["content"] = [
                blank,
                opening,
                piece("reasoning", reasoning),
                closing,
                piece("content", answer),
            ]
        else:
            turn["content"] = [piece("content", quote(message.content if apart else message.text))]
        if apart:
            turn["input"] = [piece("input", quote(message.input))]
        if message.reasoning:
            reasoning_value: Value = [piece("reasoning", quote(message.reasoning))]
            turn |= dict.fromkeys(REASONING_KEYS, reasoning_value)
        if message.tool_calls:
            turn["tool_calls"] = (quote(list(message.tool_calls)),)
        turn |= {name: (quote(value),) for name, value in message.labels}
        return turn


@dataclass(frozen=True)
class Rendered:
    """A conversation's text.

    Attributes:
        text: The text.
        spans: For each of the conversation's pieces its place (start, end); None: the template
            leaves it out.
        unmatched: Number of the first turn that the template writes otherwise than its
            placeholder, from 0; None: there is none, and `spans` are all known.
        stripped: Whether white space at the ends of a text is missing.
    """

    text: str
    spans: tuple[tuple[int, int] | None, ...]
    unmatched: int | None = None
    stripped: bool = False


class Renderer:
    """Renders conversations and finds their texts again.

    Args:
        template: The template.
    """

    def __init__(self, template: Template) -> None:
        self.template = template
        self._kept: dict[tuple[str, bool], list[str]] = {}

    def __call__(
        self, talk: Conversation, tools: list[Any] | None = None, to_go_on: bool = False
    ) -> Rendered:
        """Render a conversation.

        Args:
            talk: The conversation.
            tools: Descriptions of tools.
            to_go_on: End in the prompt for an answer.

        Raises:
            RowError: the template does not take these turns, or writes a text twice.
        """
        texts = [piece.text for piece in talk.pieces]
        text = self.template.render(talk.turns(texts), tools, to_go_on)
        literals = self._literals(talk, tools, to_go_on)
        return _match(text, literals, talk.pieces)

    def _literals(self, talk: Conversation, tools: list[Any] | None, to_go_on: bool) -> list[str]:
        """What the template writes around placeholders: text, number, text, number, ..., text."""
        key = (talk.shape, to_go_on)
        known = self._kept.get(key) if tools is None else None
        if known is not None:
            return known
        places = [f"{PLACE}{number}{PLACE}" for number in range(len(talk.pieces))]
        literals = PLACEHOLDER.split(self.template.render(talk.turns(places), tools, to_go_on))
        numbers = literals[1::2]
        for number in sorted(set(numbers), key=int):
            if numbers.count(number) > 1:
                raise RowError(
                    f"{FLAG}={self.template.name}: it writes turn"
                    f" {talk.pieces[int(number)].turn + 1} {numbers.count(number)} times, and must"
                    " once"
                )
        if tools is None and talk.cacheable:
            if len(self._kept) >= KEPT:
                self._kept.clear()
            self._kept[key] = literals
        return literals


def _match(text: str, literals: list[str], pieces: list[Piece]) -> Rendered:
    """Find the pieces in a text between the template's own."""
    spans: list[tuple[int, int] | None] = [None] * len(pieces)
    stripped = False
    position = len(literals[0])
    if not text.startswith(literals[0]):
        return Rendered(text, tuple(spans), unmatched=_turn_of(literals, 0, pieces))
    for at in range(1, len(literals), 2):
        piece = pieces[int(literals[at])]
        after = literals[at + 1]
        end = _end(text, position, piece.text, after)
        if end is None:
            return Rendered(text, tuple(spans), unmatched=piece.turn)
        spans[int(literals[at])] = (position, end)
        if end - position < len(piece.text) and not stripped:
            # Not where the template has the same white space of its own there.
            before = piece.text.index(text[position:end]) if end > position else 0
            stripped = not text.startswith(piece.text, max(position - before, 0))
        position = end + len(after)
    unmatched = None if position == len(text) else _turn_of(literals, len(literals) - 2, pieces)
    return Rendered(text, tuple(spans), unmatched, stripped)


def _end(text: str, start: int, written: str, after: str) -> int | None:
    """Where a text ends that begins at ``start`` and has ``after`` behind it; None: it is not
    there, with or without white space at its ends.
    """
    for variant in _variants(written):
        end = start + len(variant)
        if text.startswith(variant, start) and text.startswith(after, end):
            return end
    return None


def _variants(text: str) -> Iterator[str]:
    yield text
    if not (text[0].isspace() or text[-1].isspace()):
        return
    for characters in (None, "\n"):
        yield text.strip(characters)
        yield text.lstrip(characters)
        yield text.rstrip(characters)


def _turn_of(literals: list[str], at: int, pieces: list[Piece]) -> int:
    """Turn of the piece that stands nearest to a place."""
    numbers = literals[1::2]
    return pieces[int(numbers[min(at // 2, len(numbers) - 1)])].turn if numbers else 0


# -- tools


def check_tools(tools: Iterable[Any], text: str) -> None:
    """Check that a text holds the names and descriptions of tools.

    Args:
        tools: Tools, control tokens in them marked as text.
        text: The rendered text that must hold them.

    Raises:
        RowError: one is missing.
    """
    words = [
        str(about[key])
        for about in (tool.get("function", tool) for tool in tools)
        for key in ("name", "description")
        if about.get(key)
    ]
    _check_words(words, text, "tools")


def check_calls(calls: Iterable[Any], text: str) -> None:
    """Check that a text holds the names and arguments of calls of tools: see `check_tools`."""
    for call in calls:
        about = call["function"]
        words = [about["name"], *about["arguments"], *_words(about["arguments"])]
        _check_words(words, text, "calls of tools")


def _check_words(words: Iterable[str], text: str, what: str) -> None:
    plain = unmark(text)
    for word in words:
        spelled = (word, json.dumps(word)[1:-1], json.dumps(word, ensure_ascii=False)[1:-1])
        if not any(unmark(spelling).strip() in plain for spelling in spelled):
            raise RowError(f"the template does not write the whole of its {what}; use another")


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _words(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _words(item)
    elif value is not None:
        yield json.dumps(value)


def _check_private(message: Message, number: int) -> None:
    calls = json.dumps(message.tool_calls, ensure_ascii=False) if message.tool_calls else ""
    for text in (message.content, message.input, message.reasoning, calls):
        found = None if text.isascii() else PRIVATE.search(text)
        if found:
            raise RowError(
                f"turn {number + 1} ({message.role}) holds U+{ord(found.group()):04X}, which marks"
                " places while rows are encoded; take it out of the row"
            )
