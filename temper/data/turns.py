"""Turns of conversations in files, read as messages.

Both forms of a turn are read, ``{"from": ..., "value": ...}`` and
``{"role": ..., "content": ...}``, with content as text or as a list of text parts, the weights that
say in some files which turns are trained, an assistant's reasoning, and calls of tools.
"""

import json
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
    "function_call": "assistant",  # its text is the JSON of the call
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
WEIGHTS = ("loss_weight", "weight")  # LLaMA-Factory's v1 layout; OpenAI's fine-tuning files
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of an assistant's reasoning
LABELS = ("name", "tool_call_id")  # keys of a tool's turn


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
            if m.role in ("user", "assistant") and not (m.content.strip() or m.tool_calls)
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
        RowError: role or content is missing, unknown or not text, a weight is not supported, or
            calls of tools or reasoning cannot be read, or are not an assistant's.
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
    calls = _calls(item, name.strip().lower(), where)
    reasoning = _reasoning(item, where)
    if role != "assistant" and (calls or reasoning):
        raise RowError(
            f"{where} ({role}) holds {'calls of tools' if calls else 'reasoning'}, which only an"
            " assistant's turn may"
        )
    value = item.get("content", item.get("value"))
    is_call = name.strip().lower() == "function_call"
    return Message(
        role,
        "" if is_call or (calls and value is None) else _content(value, f"{where} ({role})"),
        trained=_trained(item, role, where),
        reasoning=reasoning,
        tool_calls=calls,
        labels=tuple(
            (key, read_text(item[key], f"{where}, {key!r}"))
            for key in LABELS
            if role == "tool" and item.get(key) is not None
        ),
    )


def read_tools(value: object) -> tuple[dict[str, Any], ...]:
    """Descriptions of tools, as chat templates take them, from a column: a list, or its JSON.

    Raises:
        RowError: it is no list of objects with names.
    """
    where = "column 'tools'"
    if isinstance(value, str):
        value = _json(value, where) if value.strip() else ()
    tools = value or ()
    if not isinstance(tools, list | tuple):
        raise RowError(f"{where} is {kind(tools)}, wanted a list of tools")
    found = []
    for number, tool in enumerate(map(_filled, tools), start=1):
        about = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(about, dict) or not isinstance(about.get("name"), str):
            raise RowError(f"{where}, tool {number} is no object with a name")
        found.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(found)


def split_answer(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], Message | None]:
    """Split off the last assistant turn: the turns before it, and the turn; None instead of it if
    the last turn is not an assistant's.

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
    return messages[:-1], messages[-1]


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


# -- reasoning, and calls of tools


def _reasoning(item: Mapping[str, Any], where: str) -> str:
    """An assistant's reasoning; under several keys it must be the same."""
    texts = {
        read_text(item[key], f"{where}, {key!r}") for key in REASONING if item.get(key) is not None
    } - {""}
    if len(texts) > 1:
        raise RowError(f"{where} holds different reasoning under {' and '.join(REASONING)}")
    return next(iter(texts), "")


def _calls(item: Mapping[str, Any], name: str, where: str) -> tuple[dict[str, Any], ...]:
    """Calls of tools, as chat templates take them: with arguments as objects."""
    given = item.get("tool_calls") or item.get("function_call")
    if name == "function_call":
        given = _json(item.get("content", item.get("value")), where)
    if not given:
        return ()
    calls = list(given) if isinstance(given, list | tuple) else [given]
    return tuple(_call(_filled(call), f"{where}, call {n}") for n, call in enumerate(calls, 1))


def _call(call: Any, where: str) -> dict[str, Any]:
    about = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(about, dict) or not isinstance(about.get("name"), str):
        raise RowError(f"{where} is no object with the name of a tool")
    arguments = about.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", f"{where}, arguments")
    if not isinstance(arguments, dict):
        raise RowError(f"{where} has arguments of {kind(arguments)}, wanted an object")
    number = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return number | {
        "type": "function",
        "function": {"name": about["name"], "arguments": arguments},
    }


def _json(text: object, where: str) -> Any:
    try:
        return json.loads(read_text(text, where))
    except ValueError as error:
        if isinstance(error, RowError):
            raise
        raise RowError(f"{where} is no JSON, which calls and descriptions of tools are") from error


def _filled(value: Any) -> Any:
    """A value without the nulls that tables hold for keys which a row does not have, and nothing
    but what JSON knows.
    """
    if isinstance(value, Mapping):
        return {str(key): _filled(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_filled(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
