"""Turns of conversations in files, read as messages.

Both forms of a turn are read, ``{"from": ..., "value": ...}`` and
``{"role": ..., "content": ...}``, with content as text or as a list of text parts, and the weights
that say in some files which turns are trained.
"""

from collections.abc import Mapping
from typing import Any

from temper.data.examples import Message
from temper.data.readers import RowError, kind, quote

ROLE_NAMES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "function_call": "assistant",  # the model wrote the call: its JSON is the turn's text
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
WEIGHTS = ("loss_weight", "weight")  # LLaMA-Factory's v1 layout; OpenAI's fine-tuning files
# Keys with content that would be lost: a turn that has one is broken.
UNREAD = ("tool_calls", "function_call", "reasoning_content", "thinking")


def read_text(value: object, where: str) -> str:
    """Check that a value is text that can be encoded, and return it.

    Raises:
        RowError: it is null, something else, or holds half of a surrogate pair, which no tokenizer
            can read.
    """
    if not isinstance(value, str):
        raise RowError(f"{where} is {'null' if value is None else kind(value)}, wanted text")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise RowError(f"{where} holds half of a surrogate pair, which cannot be written as UTF-8")
    return value


def read_turns(value: object, column: str) -> tuple[Message, ...]:
    """Read all turns of a conversation; a blank system turn is left out.

    Raises:
        RowError: it is no list of turns, a turn is broken or blank, or a system turn is not the
            first.
    """
    if not isinstance(value, list):
        hint = "; a table cannot hold turns, JSON lines can" if isinstance(value, str) else ""
        raise RowError(f"column {column!r} is {kind(value)}, wanted a list of turns{hint}")
    messages = tuple(
        read_turn(item, f"column {column!r}, turn {number}")
        for number, item in enumerate(value, start=1)
    )
    if any(message.role == "system" for message in messages[1:]):
        raise RowError(
            f"column {column!r}: a system turn stands after another turn; only the first may be one"
        )
    blank = next(
        (
            n
            for n, m in enumerate(messages, start=1)
            if m.role in ("user", "assistant") and not m.content.strip()
        ),
        None,
    )
    # Whether a blank last turn is an error depends on what the row is read for.
    if blank and blank < len(messages):
        raise RowError(f"column {column!r}, turn {blank} ({messages[blank - 1].role}) is empty")
    return (
        messages
        if not messages or messages[0].role != "system" or messages[0].content.strip()
        else messages[1:]
    )


def read_turn(item: object, where: str) -> Message:
    """Read one turn.

    Raises:
        RowError: role or content is missing, unknown or not text, a weight is not supported, or the
            turn holds something that is not read, such as ``tool_calls``.
    """
    if not isinstance(item, Mapping):
        raise RowError(
            f"{where} is {kind(item)}, wanted an object with role and content (or from and value)"
        )
    item = {key: value for key, value in item.items() if value is not None}
    name = item.get("role", item.get("from"))
    if name is None:
        raise RowError(
            f"{where} has neither 'role' nor 'from'; found"
            f" {', '.join(map(quote, list(item)[:6])) or 'nothing'}"
        )
    role = ROLE_NAMES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise RowError(f"{where} has the role {quote(name)}; known are {', '.join(ROLE_NAMES)}")
    unread = next((key for key in UNREAD if item.get(key)), None)
    if unread:
        raise RowError(
            f"{where} ({role}) holds {unread!r}, which is not read; write it into the content, or"
            " take it out"
        )
    return Message(
        role,
        _content(item.get("content", item.get("value")), f"{where} ({role})"),
        trained=_trained(item, role, where),
    )


def split_answer(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], str | None]:
    """Split off the last assistant turn: the turns before it, and its text; None instead of the
    text if the last turn is not an assistant's.

    Raises:
        RowError: the file says not to train on the last answer.
    """
    if not messages or messages[-1].role != "assistant":
        return messages, None
    if messages[-1].trained is False:
        raise RowError(
            f"its last answer has {WEIGHTS[0]} 0; end the conversation with an answer that is to be"
            " trained"
        )
    return messages[:-1], messages[-1].content


def _content(value: object, where: str) -> str:
    if isinstance(value, list):
        return "".join(
            _part(part, f"{where}, part {number}") for number, part in enumerate(value, start=1)
        )
    return read_text(value, where)


def _part(part: object, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        found = f"type {quote(part.get('type'))}" if isinstance(part, Mapping) else kind(part)
        raise RowError(f"{where} is of {found}; only parts of type 'text' are read")
    return read_text(part.get("text", part.get("value")), where)


def _trained(item: Mapping[str, Any], role: str, where: str) -> bool | None:
    key = next((name for name in WEIGHTS if item.get(name) is not None), None)
    if key is None:
        return None
    weight = item[key]
    if not isinstance(weight, int | float) or weight not in (0, 1):
        raise RowError(
            f"{where} has {key} {quote(weight)}; 0 and 1 are read, shares of a loss are not"
        )
    if weight and role != "assistant":
        raise RowError(f"{where} ({role}) has {key} 1; only assistant turns are trained, write 0")
    return bool(weight) if role == "assistant" else None
