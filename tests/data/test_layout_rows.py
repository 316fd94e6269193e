"""Rows of every layout become prompts and answers; broken turns and answers are named."""

from pathlib import Path

import pytest

from temper.data.examples import Message
from temper.data.layouts import read_examples
from tests.data.layout_cases import failure, jsonl, said


def test_alpaca_rows_may_have_input_system_and_history(tmp_path: Path):
    row = {
        "instruction": "Shorten",
        "input": "a long text",
        "output": "text",
        "system": "Be brief",
        "history": [["Hi", "Hello"]],
    }
    found = next(iter(read_examples(jsonl([row], tmp_path / "rows.jsonl"), "supervised")))
    asked = Message("user", "Shorten", "a long text")
    assert found.prompt == (
        Message("system", "Be brief"),
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        asked,
    )
    assert found.question == asked.text == "Shorten\n\na long text"


def test_tool_calls_and_tools_become_turns(tmp_path: Path):
    turns = [
        {"from": "human", "value": "A recipe?"},
        {"from": "function_call", "value": '{"name": "find"}'},
        {"from": "observation", "value": "[]"},
        {"from": "gpt", "value": "None found"},
    ]
    rows = [
        {"conversations": turns, "tools": '[{"name": "find"}]', "system": "Be brief"},
        {"conversations": turns, "tools": "[]"},
    ]
    first, second = read_examples(jsonl(rows, tmp_path / "rows.jsonl"), "supervised")
    assert first.prompt[0] == Message("system", "Be brief")
    assert first.tools == ({"type": "function", "function": {"name": "find"}},)
    assert second.tools == () and second.turns == ()
    call = {"type": "function", "function": {"name": "find", "arguments": {}}}
    assert second.prompt == (
        Message("user", "A recipe?"),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "[]"),
    )


def test_calls_and_reasoning_are_read_in_every_spelling(tmp_path: Path):
    find = {"name": "find", "arguments": '{"what": "soup", "n": 2}'}
    called = {"name": "find", "arguments": {"what": "soup", "n": 2}}
    asked = {"role": "user", "content": "A recipe?"}
    result = {"role": "tool", "content": "[]", "tool_call_id": "c1", "name": "find", "x": None}
    spellings: list[dict] = [
        {"content": None, "tool_calls": [{"id": "c1", "type": "function", "function": find}]},
        {"tool_calls": [find], "function_call": None, "reasoning_content": None},
        {"content": "", "function_call": find},
    ]
    for spelling in spellings:
        turns = [asked, {"role": "assistant"} | spelling]
        rows = [{"messages": [*turns, result, said("None")]}, {"messages": turns}]
        middle, last = read_examples(jsonl(rows, tmp_path / "rows.jsonl"), "supervised")
        assert middle.prompt[1].tool_calls[0]["function"] == called
        assert middle.prompt[2].labels == (("name", "find"), ("tool_call_id", "c1"))
        assert last.answers == ("",) and last.replies[0].tool_calls[0]["function"] == called
    for key in ("reasoning_content", "thinking", "reasoning"):
        row = {"messages": [asked, said("None") | {key: "why"}]}
        (found,) = read_examples(jsonl([row], tmp_path / "rows.jsonl"), "supervised")
        assert found.replies == (Message("assistant", "None", reasoning="why"),)


def test_loss_weights_are_kept_or_make_a_broken_row(tmp_path: Path):
    def row(*weights: object) -> dict:
        roles = ("user", "assistant") * 2
        return {
            "messages": [
                {"role": r, "content": "x", "loss_weight": w}
                for r, w in zip(roles, weights, strict=True)
            ]
        }

    file = jsonl(
        [row(0, 0, 0, 1), row(0, 1, None, True), row(None, None, None, None)],
        tmp_path / "rows.jsonl",
    )
    assert [e.prompt[1].trained for e in read_examples(file, "supervised")] == [False, True, None]
    for weights, reason in (
        ((1, 0, 0, 1), "turn 1 (user) has loss_weight 1; only assistant turns are trained"),
        ((0, 0.5, 0, 1), "turn 2 has loss_weight 0.5; 0 and 1 are read"),
        ((0, 1, 0, 0), "its last answer has loss_weight 0"),
    ):
        assert reason in failure(jsonl([row(*weights)], tmp_path / "rows.jsonl"))


def test_answers_become_references_where_prompts_are_wanted(tmp_path: Path):
    rows = {
        "supervised": ({"prompt": "Soup?", "completion": "Yes"}, "Yes"),
        "without": ({"prompt": "Soup?", "completion": ""}, None),
        "pair": ({"prompt": "Soup?", "chosen": "Yes", "rejected": "No"}, "Yes"),
        "undesirable": ({"prompt": "Soup?", "completion": "No", "label": False}, None),
        "turns": ({"messages": [{"role": "user", "content": "Soup?"}]}, None),
    }
    for name, (row, reference) in rows.items():
        found = list(read_examples(jsonl([row], tmp_path / f"{name}.jsonl"), "prompt"))
        assert [(e.question, e.answers, e.reference) for e in found] == [("Soup?", (), reference)]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (
            "text",
            "column 'messages' is text, wanted a list of turns",
        ),
        (["a"], "turn 1 is text, wanted an object with role and content"),
        ([{"content": "a"}], "turn 1 has neither 'role' nor 'from'; found 'content'"),
        (
            [{"role": "narrator", "content": "a"}],
            "turn 1 has the role 'narrator'; known are system, ",
        ),
        ([{"role": ["user"], "content": "a"}], "turn 1 has the role ['user']; known are"),
        ([{"role": "user"}], "turn 1 (user) is null, wanted text"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "turn 1 (user), part 1 is of type 'image_url'; only parts",
        ),
        ([{"role": "user", "content": ""}, said("b")], "turn 1 (user) is empty"),
        (
            [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
            "a system turn stands after another turn",
        ),
        (
            [{"role": "assistant", "content": "a", "tool_calls": [{}]}],
            "turn 1, call 1 is no object with the name of a tool",
        ),
        (
            [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}, said("b")],
            "turn 1 (user) holds calls of tools, which only an assistant's turn may",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}],
            "turn 1, call 1, arguments is no JSON",
        ),
        (
            [{"role": "assistant", "content": "a", "thinking": "b", "reasoning": "c"}],
            "turn 1 holds different reasoning under",
        ),
        (
            [{"from": "function_call", "value": "find soup"}],
            "turn 1 is no JSON, which calls",
        ),
        (
            [{"role": "user", "content": "a"}],
            "its last turn is of user, wanted assistant",
        ),
        ([{"role": "user", "content": "a"}, said(" ")], "its answer is empty"),
        ([said("a")], "before the answer stands nothing; wanted a user's turn"),
        (
            [{"role": "user", "content": "a"}, said("b"), said("c")],
            "before the answer stands the turn of assistant",
        ),
        ([], "its last turn is of nothing"),
    ],
)
def test_broken_turns_are_named(turns: object, reason: str, tmp_path: Path):
    assert reason in failure(jsonl([{"messages": turns}], tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("want", "row", "reason"),
    [
        (
            "preference",
            {"prompt": "a", "chosen": "b", "rejected": ""},
            "its rejected answer is empty",
        ),
        (
            "preference",
            {"prompt": "a", "chosen": "", "rejected": "b"},
            "its chosen answer is empty",
        ),
        (
            "preference",
            {"chosen": "b", "rejected": "c"},
            "there is no prompt; add one of prompt, question",
        ),
        (
            "preference",
            {"prompt": "a", "chosen": [], "rejected": "c"},
            "it holds no turns",
        ),
        (
            "preference",
            {
                "prompt": "a",
                "chosen": [{"role": "user", "content": "x"}, said("b")],
                "rejected": "c",
            },
            "their turns before",
        ),
        (
            "preference",
            {key: [{"role": "user", "content": "x"}, said(key)] for key in ("chosen", "rejected")}
            | {"prompt": "a"},
            "column 'prompt' is not the prompt in the turns",
        ),
        (
            "kto",
            {"prompt": "a", "completion": "b", "label": "maybe"},
            "column 'label' is 'maybe'; wanted true (desirable) or false",
        ),
        ("unlearning", {"question": "a", "answer": "b", "idk": ""}, "column 'idk' is empty"),
        (
            "supervised",
            {"prompt": "a", "completion": [{"role": "user", "content": "x"}, said("b")]},
            "holds 2 turns, wanted the answer alone",
        ),
    ],
)
def test_broken_answers_are_named(want: str, row: dict, reason: str, tmp_path: Path):
    assert reason in failure(jsonl([row], tmp_path / "rows.jsonl"), want)


def test_all_rows_of_a_file_have_a_substitute_or_none(tmp_path: Path):
    row = {"question": "a", "answer": "b"}
    line = failure(jsonl([row | {"idk": "c"}, row], tmp_path / "rows.jsonl"), "unlearning")
    assert "row 2: its number of answers is 1, not 2; " in line


def test_two_different_system_texts_are_a_broken_row(tmp_path: Path):
    turns = [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Soup?"},
        said("Yes"),
    ]
    same, other = ({"messages": turns, "system": text} for text in ("Be brief", "Be kind"))
    assert (
        next(iter(read_examples(jsonl([same], tmp_path / "rows.jsonl"), "supervised")))
        .prompt[0]
        .content
        == "Be brief"
    )
    assert "different system texts; keep one" in failure(jsonl([other], tmp_path / "rows.jsonl"))
