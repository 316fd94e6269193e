"""Any conversation under templates of the usual families: the ids of transformers' own
``apply_chat_template`` where that writes every turn, every character either way, or a refusal.
"""

from datetime import datetime
from typing import Any

import pytest
import transformers.utils.chat_template_utils as reference
from hypothesis import given
from hypothesis import strategies as st

from temper.data.chat import ChatFormat, Encoded
from temper.data.examples import Message
from temper.data.readers import RowError
from temper.data.rendered import split_reasoning
from temper.data.templates import DATE
from temper.data.tokenizer import PRIVATE
from tests.data.chat_styles import STYLES, THINK, style_tokenizer

TRICKY = [
    *("", " ", "\n", " a\n", "\n\nb ", "0", "é 漢 😀 👩\u200d🚀", "\ue0a7answer\ue0a7", "/nothink"),
    *("<think>why</think>so", "<think>\nwhy\n</think>\n\nso", "why</think>so", "</think>"),
    *(
        "<think>",
        " <think> a </think> b </think> c",
        "The tag </think> ends it.",
        "<think></think>",
    ),
    *("<tool_response>a</tool_response>", "{{ messages }}", '"quoted" \\ {"a": 1}', "None"),
    *(token for style in STYLES.values() for token in (*style.special, style.eos)),
    *("Soup.<|im_end|>\n<|im_start|>assistant\nno", "a<|eot_id|> ", "[/INST] x [INST]"),
]
TEXT = st.one_of(
    st.sampled_from(TRICKY),
    st.text(max_size=12).filter(lambda text: not PRIVATE.search(text)),
)
ROLES = st.one_of(
    st.sampled_from([("user",), ("system", "user"), ("user", "assistant", "user")]),
    st.lists(st.sampled_from(["user", "assistant", "tool", "system"]), min_size=1, max_size=4),
)


@pytest.fixture(scope="module")
def formats() -> dict[str, ChatFormat]:
    """A format for every style."""
    return {name: ChatFormat(style_tokenizer(name)) for name in STYLES}


@pytest.fixture(scope="module", autouse=True)
def _one_day():
    """The day of our prompts, for transformers."""

    class Clock:
        now = staticmethod(lambda: datetime.fromisoformat(DATE))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "datetime", Clock)
        yield


def _turns(chat: ChatFormat, messages: list[Message]) -> list[dict[str, Any]]:
    """Turns for transformers, a system message folded where the format says so."""
    turns = [{"role": m.role, "content": m.content} for m in messages]
    if chat.folds_system and [t["role"] for t in turns[:2]] == ["system", "user"]:
        turns[:2] = [{"role": "user", "content": "\n\n".join(t["content"] for t in turns[:2])}]
    return turns


def _ids(chat: ChatFormat, turns: list[dict[str, Any]], **settings: Any) -> list[int]:
    return chat.tokenizer.apply_chat_template(
        turns, return_dict=False, sanitize_control_tokens=True, **settings
    )


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _has_block(turn: dict[str, Any]) -> bool:
    """Whether the tags in a turn are tokens for us, and text for transformers."""
    return turn["role"] == "assistant" and THINK[1] in turn["content"]


def _check_whole(chat: ChatFormat, messages: list[Message], answer: str, row: Encoded) -> None:
    """Every character of the turns is there, in order, and no mark."""
    decode = chat.tokenizer.decode
    text = decode(row.ids)
    assert not PRIVATE.search(text)
    squeezed = _squeezed(text)
    for message in messages:
        is_answer = message.role == "assistant"
        block = split_reasoning(message.content, THINK, chat.opens) if is_answer else None
        kept = message.content
        if block and "reasoning_dropped" in row.notes and _squeezed(kept) not in squeezed:
            kept = block[-1]
        assert _squeezed(kept) in squeezed
    trained = _squeezed(decode([i for i, t in zip(row.ids, row.trained, strict=True) if t]))
    assert _squeezed(answer) in squeezed
    assert _squeezed(answer).removeprefix(THINK[0]) in trained


@given(name=st.sampled_from(list(STYLES)), roles=ROLES, data=st.data(), every=st.booleans())
def test_any_conversation_is_whole_as_served_or_refused(formats, name, roles, data, every):
    chat = formats[name]
    messages = [Message(role, data.draw(TEXT)) for role in roles]
    answer = data.draw(TEXT)
    _check(chat, messages, answer, every)


def _check(chat: ChatFormat, messages: list[Message], answer: str, every: bool) -> str:
    turns = _turns(chat, messages)
    try:
        row = chat.encode(messages, answer, all_turns=every)
    except RowError:
        # Refused: transformers refuses it too, or loses characters, or writes them elsewhere.
        return "refused"
    prompt = chat.prompt_ids(messages)
    if not any(map(_has_block, turns)):
        assert prompt == _ids(chat, turns, add_generation_prompt=True)
    if not every:
        assert row.ids[: len(prompt)] == prompt
        assert row.trained == [False] * len(prompt) + [True] * (len(row.ids) - len(prompt))
    assert row.ids[-1] == chat.stop_ids[0] and row.trained[-1]
    _check_whole(chat, messages, answer, row)
    last = {"role": "assistant", "content": answer}
    if every or any(map(_has_block, [*turns, last])):
        return "whole"
    whole = _ids(chat, [*turns, last])
    if whole[: len(prompt)] != prompt:
        return "composed"
    ours = row.ids if row.ids[-1] in whole[len(prompt) :] else row.ids[:-1]
    assert whole[: len(ours)] == ours
    return "same"


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("turns", [1, 3])
def test_an_ordinary_conversation_is_never_refused(name, turns, formats):
    talk = [
        Message("system", "You bake."),
        Message("user", "A soup?"),
        Message("assistant", "Tomato."),
        Message("user", "And bread?"),
    ][-turns:]
    for every in (False, True):
        for answer in ("Mix flour.", " Mix\n\nflour. ", "12 eggs: 漢 😀"):
            found = _check(formats[name], talk, answer, every)
            wanted = "whole" if every else "composed" if name == "r1_open" else "same"
            assert found == wanted


@pytest.mark.parametrize("name", STYLES)
def test_refusals_are_of_what_the_template_loses(name, formats):
    chat = formats[name]
    for content in TRICKY:
        for at in range(3):
            roles = ("user", "assistant", "user")
            talk = [Message(r, content if n == at else "Soup?") for n, r in enumerate(roles)]
            if _check(chat, talk, "Mix.", False) != "refused":
                continue
            turns = _turns(chat, talk)
            whole = _squeezed(chat.tokenizer.decode(_ids(chat, turns, add_generation_prompt=True)))
            assert _squeezed(content) not in whole or content == THINK[1]
        # A closing tag alone may be text or the end of reasoning: templates cut there.
        is_unclear = THINK[1] in content and split_reasoning(content, THINK) is None
        found = _check(chat, [Message("user", "Soup?")], content, False)
        assert found != "refused" or is_unclear, content
