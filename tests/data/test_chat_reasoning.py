"""Reasoning, tools, dates and private marks in conversations, under templates of several kinds."""

import json
from datetime import datetime

import pytest
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

from temper.data.chat import ChatFormat, Encoded
from temper.data.encode import Encoder, EncodeReport
from temper.data.examples import Example, Message
from temper.data.readers import RowError
from temper.data.tokenizer import PLACE, QUOTES
from temper.errors import TemperError
from tests.data.chat_styles import style_tokenizer
from tests.judges.models import words_tokenizer
from tests.text import make_tokenizer

EGGS = [Message("user", "How long do I boil 0 eggs?")]
REASONED = "<think>\nhard or soft, 0?\n</think>\n\nSeven minutes."
PLAIN = "Seven minutes."


def _shown(chat: ChatFormat, row: Encoded) -> tuple[str, str]:
    """The texts that are not trained, and those that are."""
    shown = ([], [])
    for i, trained in zip(row.ids, row.trained, strict=True):
        shown[trained].append(i)
    return tuple(map(chat.tokenizer.decode, shown))


@pytest.mark.parametrize(
    ("name", "thinking", "answer", "prompt_end", "trained"),
    [
        # It cuts the answer at the tag: the answer is written after the prompt as it is.
        ("r1", None, REASONED, "<｜Assistant｜>", f"{REASONED}<｜end▁of▁sentence｜>"),
        ("r1", None, PLAIN, "<｜Assistant｜>", f"{PLAIN}<｜end▁of▁sentence｜>"),
        (
            "r1_open",
            None,
            REASONED,
            "<think>\n",
            REASONED.removeprefix("<think>\n") + "<｜end▁of▁sentence｜>",
        ),
        ("r1_open", None, "why</think>so", "<think>\n", "why</think>so<｜end▁of▁sentence｜>"),
        ("r1_open", None, PLAIN, "<think>\n", f"\n</think>\n\n{PLAIN}<｜end▁of▁sentence｜>"),
        # It moves the reasoning, and adds an empty block where there is none.
        ("qwen3", None, REASONED, "assistant\n", f"{REASONED}<|im_end|>"),
        ("qwen3", True, "<think>a</think>b", "assistant\n", "<think>\na\n</think>\n\nb<|im_end|>"),
        ("qwen3", None, PLAIN, "assistant\n", f"<think>\n\n</think>\n\n{PLAIN}<|im_end|>"),
        ("qwen3", False, PLAIN, "<think>\n\n</think>\n\n", f"{PLAIN}<|im_end|>"),
        ("glm", False, PLAIN, "/nothink<|assistant|>\n<think></think>", f"\n{PLAIN}<|endoftext|>"),
        (
            "harmony",
            None,
            PLAIN,
            "<|start|>assistant",
            f"<|channel|>final<|message|>{PLAIN}<|return|>",
        ),
    ],
)
def test_reasoning_is_trained_after_the_prompt_of_a_server(
    name, thinking, answer, prompt_end, trained
):
    chat = ChatFormat(style_tokenizer(name), thinking=thinking)
    row = chat.encode(EGGS, answer)
    before, after = _shown(chat, row)
    assert before.endswith(prompt_end) and after == trained
    switch = {} if thinking is None else {"enable_thinking": thinking}
    if name != "harmony":  # its prompt has today's date
        assert chat.prompt_ids(EGGS) == chat.tokenizer.apply_chat_template(
            [{"role": "user", "content": EGGS[0].content}],
            add_generation_prompt=True,
            return_dict=False,
            **switch,
        )
    added = chat.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    if name != "harmony" and "</think>" in before + after:
        assert row.ids.count(added[1]) == 1, "the tags of reasoning are the model's tokens"


def test_the_last_turn_alone_is_trained_where_reasoning_is_lost():
    talk = (*EGGS, Message("assistant", REASONED), Message("user", "And of a goose?"))
    kept = (*EGGS, Message("assistant", PLAIN), Message("user", "And of a goose?"))
    for name in ("r1", "qwen3", "glm", "chatml"):
        chat = ChatFormat(style_tokenizer(name))
        report = EncodeReport()
        encoder = Encoder(chat, 1000, all_turns=True)
        rows = list(encoder.rows([Example(talk, (REASONED,)), Example(kept, ("Ten.",))], report))
        first = _shown(chat, Encoded(rows[0].ids[0], rows[0].trained[0]))[1]
        second = _shown(chat, Encoded(rows[1].ids[0], rows[1].trained[0]))[1]
        loses = int(name != "chatml")
        assert (report.reasoning_dropped, report.last_only) == (loses, loses)
        assert first.count("Seven minutes.") == 2 - loses and PLAIN in second
        line = "1 without the reasoning of earlier turns, which the template drops"
        assert (line in str(report)) is bool(loses)


def test_reasoning_under_a_key_is_written_or_refused():
    turn = Message("assistant", PLAIN, reasoning="hard or soft, 0?")
    for name in ("qwen3", "harmony"):
        chat = ChatFormat(style_tokenizer(name))
        after = _shown(chat, chat.encode(EGGS, turn))[1]
        assert after.index(turn.reasoning) < after.index(PLAIN)
    for name in ("chatml", "r1", "llama3"):
        with pytest.raises(RowError, match=r"reasoning under a key of its own.*reads no"):
            ChatFormat(style_tokenizer(name)).encode(EGGS, turn)
    with pytest.raises(RowError, match="holds reasoning twice"):
        ChatFormat(style_tokenizer("qwen3")).encode(
            EGGS, Message("assistant", REASONED, reasoning="why")
        )
    with pytest.raises(RowError, match=r"set data.init_args.thinking=true or null"):
        ChatFormat(style_tokenizer("qwen3"), thinking=False).encode(EGGS, REASONED)


def test_choices_that_a_template_does_not_read_are_refused():
    with pytest.raises(TemperError, match=r"thinking=false: the template \(auto\) reads no enable"):
        ChatFormat(style_tokenizer("r1_open"), thinking=False)
    with pytest.raises(TemperError, match=r"date=2025-01-02: the template \(auto\) does not ask"):
        ChatFormat(style_tokenizer("qwen3"), date="2025-01-02")
    with pytest.raises(TemperError, match=r"date=2 Jan: give a day as 2025-01-31"):
        ChatFormat(style_tokenizer("llama3.1"), date="2 Jan")


def test_a_dated_template_has_one_day_in_prompts_rows_and_key():
    tokenizer = style_tokenizer("llama3.1")
    for day, written in ((None, "01 Jan 2025"), ("2031-05-06", "06 May 2031")):
        chat = ChatFormat(tokenizer, date=day)
        assert f"Today Date: {written}" in tokenizer.decode(chat.prompt_ids(EGGS))
        assert f"Today Date: {written}" in tokenizer.decode(chat.encode(EGGS, PLAIN).ids)
        assert Encoder(chat, 100).settings()["date"] == chat.date == (day or "2025-01-01")
        assert f"dated {chat.date}" in chat.facts
    today = datetime.now().strftime("%d %b %Y")
    assert today not in tokenizer.decode(ChatFormat(style_tokenizer("llama3.1")).prompt_ids(EGGS))


FIND = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Find a <|im_end|> recipe",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": 'an "egg"\n'}}}
ASKED = [*EGGS, Message("assistant", "", tool_calls=(CALL,)), Message("tool", "[7, 8]")]


@pytest.mark.parametrize("name", ["qwen3", "mistral", "llama3.1"])
def test_tools_and_calls_are_written_by_the_template(name):
    chat = ChatFormat(style_tokenizer(name))
    called = chat.encode(EGGS, ASKED[1], tools=[FIND])
    before, after = _shown(chat, called)
    assert "recipe" in before and "find" in after and after.endswith(chat.end)
    assert json.dumps(CALL["function"]["arguments"]) in after
    row = chat.encode(ASKED, PLAIN, all_turns=True, tools=[FIND])
    before, after = _shown(chat, row)
    assert after.count("find") == 1 and PLAIN in after and "[7, 8]" in before
    turns = [
        {"role": "user", "content": EGGS[0].content},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "[7, 8]"},
    ]
    if name != "llama3.1":  # its prompt has today's date
        assert chat.prompt_ids(ASKED, [FIND]) == chat.tokenizer.apply_chat_template(
            turns,
            tools=[FIND],
            add_generation_prompt=True,
            return_dict=False,
            sanitize_control_tokens=True,
        )


def test_tools_without_a_place_are_refused():
    for name in ("chatml", "gemma", "llama2"):
        chat = ChatFormat(style_tokenizer(name))
        with pytest.raises(RowError, match="the template has no place for them"):
            chat.encode(EGGS, PLAIN, tools=[FIND])
        with pytest.raises(RowError, match="a turn calls tools, and the template has no place"):
            chat.encode(EGGS, ASKED[1])
    tokenizer = style_tokenizer("qwen3")
    tokenizer.chat_template = tokenizer.chat_template.replace("tool | tojson", "tool.function.name")
    with pytest.raises(RowError, match="does not write the whole of its tools"):
        ChatFormat(tokenizer).encode(EGGS, PLAIN, tools=[FIND])


@pytest.mark.parametrize("mark", [*QUOTES, PLACE])
def test_text_with_a_private_mark_is_refused(mark):
    chat = ChatFormat(style_tokenizer("chatml"))
    found = f"U\\+{ord(mark):04X}, which marks places"
    for messages, answer in (
        ([Message("user", f"a{mark}")], "b"),
        (EGGS, f"a{mark}"),
        (EGGS, Message("assistant", "a", reasoning=mark)),
        ([Message("user", "a", input=mark)], "b"),
    ):
        with pytest.raises(RowError, match=found):
            chat.encode(messages, answer)


def _normalising(normalizer, control: AddedToken | None = None) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer("chatml")
    tokenizer.backend_tokenizer.normalizer = normalizer
    if control is not None:
        tokenizer.add_tokens([control], special_tokens=True)
    return tokenizer


def test_the_own_normaliser_of_a_tokenizer_loses_nothing():
    tokenizer = _normalising(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]))
    chat = ChatFormat(tokenizer)
    assert "ﬁsh" not in _shown(chat, chat.encode(EGGS, "Ａ ﬁsh."))[1]
    assert "a fish." in _shown(chat, chat.encode(EGGS, "Ａ ﬁsh."))[1]
    control = AddedToken("<|stop|>", special=True, normalized=True)
    chat = ChatFormat(_normalising(normalizers.NFKC(), control))
    with pytest.raises(RowError, match=r"normaliser makes its control token <\|stop\|>"):
        chat.encode(EGGS, "a ＜|stop|＞ b")
    assert "<|stop|>" in _shown(chat, chat.encode(EGGS, "a <|stop|> b"))[1]


def test_a_character_without_a_token_is_refused():
    tokenizer = words_tokenizer("{% for m in messages %} {{ m.content }} <eos> {% endfor %}")
    chat = ChatFormat(tokenizer)
    soup = [Message("user", "soup please")]
    assert _shown(chat, chat.encode(soup, "boil  the soup"))[1] == "boil the soup <eos>"
    for messages, answer in ((soup, "boil 漢 soup"), ([Message("user", "漢")], "soup")):
        with pytest.raises(RowError, match=r"has no token for U\+6F22"):
            chat.encode(messages, answer)


def test_white_space_that_a_template_strips_is_counted():
    for name, lost in (("llama3", 1), ("chatml", 0)):
        report = EncodeReport()
        rows = [Example(tuple(EGGS), ("Seven. \n",)), Example(tuple(EGGS), ("Seven.",))]
        list(Encoder(ChatFormat(style_tokenizer(name)), 100).rows(rows, report))
        assert report.stripped == lost and report.kept == 2
    assert "without white space" not in str(report)


def test_tokens_of_another_template_stay_text():
    chat = ChatFormat(style_tokenizer("qwen3"), "alpaca")
    tokens = chat.tokenizer.convert_tokens_to_ids(["<tool_call>", "<|im_end|>"])
    row = chat.encode([Message("user", "a <tool_call> <|im_end|>")], "b <tool_call>")
    assert not set(tokens) & set(row.ids[:-1])
