"""Layouts: detected, explained, read back as they were written; broken rows are named and
counted.
"""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from temper.data.examples import Example, Message
from temper.data.files import ReadReport
from temper.data.layouts import LAYOUTS, describe_layout, read_examples
from temper.errors import TemperError

SHARED = Path(__file__).parents[3] / "shared" / "data"
SOUP = {"instruction": "Cook soup", "input": "", "output": "Boil water"}

words = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20
).filter(str.strip)
blank_or_words = st.just("") | words
rounds = st.lists(st.tuples(words, words), max_size=2)


@st.composite
def examples(
    draw: st.DrawFn, n_answers: int = 1, turns: bool = True, marked: bool = False
) -> Example:
    """A conversation of some rounds, and answers to its last turn."""
    system = (Message("system", text),) if turns and (text := draw(blank_or_words)).strip() else ()
    earlier = (
        [m for ask, say in draw(rounds) for m in (Message("user", ask), Message("assistant", say))]
        if turns
        else []
    )
    answers = tuple(draw(words) for _ in range(n_answers))
    return Example(
        (*system, *earlier, Message("user", draw(words))),
        answers,
        draw(st.booleans()) if marked else None,
    )


def openai(messages: list[Message] | tuple[Message, ...]) -> list[dict]:
    return [{"role": m.role, "content": m.content} for m in messages]


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


def sharegpt(messages: list[Message] | tuple[Message, ...]) -> list[dict]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(m.role, m.role), "value": m.content} for m in messages]


def parts(messages: list[dict]) -> list[dict]:
    """LLaMA-Factory's v1: content in parts, and a weight of the loss."""
    return [
        {
            "role": m["role"],
            "content": [{"type": "text", "value": m["content"]}],
            "loss_weight": float(n == len(messages) - 1),
        }
        for n, m in enumerate(messages)
    ]


def whole(example: Example, answer: int = 0) -> list[dict]:
    return [*openai(example.prompt), said(example.answers[answer])]


pairs = examples(n_answers=2)
bare_pairs = examples(n_answers=2, turns=False)
one = examples()
bare = examples(turns=False)
# layout, what is wanted, examples, how one is written
WRITTEN = [
    ("messages", "supervised", one, lambda e: {"messages": whole(e)}),
    ("messages", "supervised", one, lambda e: {"messages": parts(whole(e))}),
    ("messages", "unlearning", pairs, lambda e: {"messages": whole(e), "idk": e.answers[1]}),
    (
        "sharegpt",
        "supervised",
        one,
        lambda e: {"conversations": [*sharegpt(e.prompt), {"from": "gpt", "value": e.answers[0]}]},
    ),
    (
        "prompt_completion",
        "supervised",
        one,
        lambda e: {"prompt": openai(e.prompt), "completion": [said(e.answers[0])]},
    ),
    (
        "preference",
        "preference",
        pairs,
        lambda e: {
            "prompt": openai(e.prompt),
            "chosen": said(e.answers[0]),
            "rejected": e.answers[1],
        },
    ),
    (
        "preference",
        "preference",
        pairs,
        lambda e: {"messages": openai(e.prompt), "chosen": whole(e), "rejected": whole(e, 1)},
    ),
    (
        "preference",
        "preference",
        pairs,
        lambda e: {"prompt": e.question, "chosen": whole(e), "rejected": whole(e, 1)},
    ),
    (
        "preference",
        "preference",
        pairs,
        lambda e: {
            "conversations": sharegpt(e.prompt),
            "chosen": {"from": "gpt", "value": e.answers[0]},
            "rejected": e.answers[1],
        },
    ),
    (
        "preference_messages",
        "preference",
        pairs,
        lambda e: {"chosen_messages": parts(whole(e)), "rejected_messages": parts(whole(e, 1))},
    ),
    (
        "preference_messages",
        "preference",
        pairs,
        lambda e: {"chosen": whole(e), "rejected": whole(e, 1)},
    ),
    (
        "kto_messages",
        "kto",
        examples(marked=True),
        lambda e: {"messages": whole(e), "label": e.desirable},
    ),
]
FLAT = [  # fit for tables too
    (
        "alpaca",
        "supervised",
        bare,
        lambda e: {"instruction": e.question, "input": "", "output": e.answers[0]},
    ),
    ("alpaca", "unlearning", bare, lambda e: {"instruction": e.question, "output": e.answers[0]}),
    (
        "prompt_completion",
        "supervised",
        bare,
        lambda e: {"question": e.question, "answer": e.answers[0], "source": "a book"},
    ),
    (
        "prompt_completion",
        "supervised",
        bare,
        lambda e: {"prompt": e.question, "response": e.answers[0]},
    ),
    (
        "prompt_completion",
        "unlearning",
        bare_pairs,
        lambda e: {"question": e.question, "answer": e.answers[0], "substitute": e.answers[1]},
    ),
    (
        "preference",
        "preference",
        bare_pairs,
        lambda e: {"prompt": e.question, "chosen": e.answers[0], "rejected": e.answers[1]},
    ),
    (
        "kto",
        "kto",
        examples(turns=False, marked=True),
        lambda e: {"prompt": e.question, "completion": e.answers[0], "label": str(e.desirable)},
    ),
    (
        "kto",
        "kto",
        examples(turns=False, marked=True),
        lambda e: {"instruction": e.question, "output": e.answers[0], "kto_tag": int(e.desirable)},
    ),
    ("prompt", "prompt", examples(n_answers=0, turns=False), lambda e: {"prompt": e.question}),
    (
        "prompt",
        "prompt",
        examples(n_answers=0, turns=False),
        lambda e: {"instruction": e.question, "input": ""},
    ),
]


def jsonl(rows: list, file: Path) -> Path:
    file.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return file


def table(rows: list[dict], file: Path) -> Path:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def contents(found: list[Example]) -> list[tuple]:
    return [
        ([(m.role, m.content, m.input) for m in e.prompt], e.answers, e.desirable) for e in found
    ]


def failure(file: Path, want: str = "supervised", **options: object) -> str:
    with pytest.raises(TemperError) as caught:
        list(read_examples(file, want, flag="--data.path", **options))  # type: ignore[arg-type]
    line = str(caught.value)
    assert (
        line.startswith(f"--data.path={file}: ")
        and "\n" not in line
        and len(line) < 800 + len(str(file))
    )
    return line


@pytest.mark.parametrize("case", range(len(WRITTEN + FLAT)))
def test_every_layout_comes_back_as_it_was_written(case: int, tmp_path: Path):
    layout, want, strategy, write = (WRITTEN + FLAT)[case]

    @given(wanted=st.lists(strategy, min_size=1, max_size=4))
    def check(wanted: list[Example]) -> None:
        files = [jsonl([write(e) for e in wanted], tmp_path / "rows.jsonl")]
        files += (
            [table([write(e) for e in wanted], tmp_path / "rows.csv")]
            if case >= len(WRITTEN)
            else []
        )
        for file in files:
            assert describe_layout(file).name == layout
            for name in ("auto", layout):
                found = list(read_examples(file, want, layout=name))  # type: ignore[arg-type]
                assert contents(found) == contents(wanted)
                assert [(e.file, e.row) for e in found] == [
                    (str(file), n) for n in range(1, len(wanted) + 1)
                ]

    check()


def test_turns_come_back_from_parquet(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    e = Example((Message("system", "Be short"), Message("user", "Soup?")), ("Yes", "No"))
    rows = [
        {"messages": openai(e.prompt), "chosen": whole(e), "rejected": whole(e, 1), "system": None}
    ] * 300
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert contents(list(read_examples(tmp_path / "rows.parquet", "preference"))) == contents(
        [e] * 300
    )


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
    assert first.prompt[0] == Message(
        "system", 'Be brief\n\nYou can call these tools:\n[{"name": "find"}]'
    )
    assert [(m.role, m.content) for m in second.prompt] == [
        ("user", "A recipe?"),
        ("assistant", '{"name": "find"}'),
        ("tool", "[]"),
    ]


def test_loss_weights_are_kept_or_make_a_broken_row(
    tmp_path: Path,
):
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


def test_a_layout_is_explained_with_the_columns_read(tmp_path: Path):
    file = jsonl(
        ["broken", SOUP | {"id": 1, "source": "a book", "system": None}], tmp_path / "rows.jsonl"
    )
    assert (
        str(describe_layout(file))
        == "layout alpaca, from the columns 'instruction', 'input', 'output', 'id' of row 2; not"
        " read: 'source', 'system'"
    )
    with pytest.raises(
        TemperError,
        match=(
            r"no row has a known layout; the first: found the columns 'a'; expected, nearest"
            r" first, "
        ),
    ):
        describe_layout(jsonl([{"a": 1}], tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("want", "row", "reason"),
    [
        ("supervised", '{"instruction": "a", }', "bad JSON: "),
        (
            "supervised",
            {"instruction": "a", "outptu": "b"},
            "(is 'outptu' for 'output' a typing error?); expected alpaca"
            " (instruction + output|response)",
        ),
        ("supervised", SOUP | {"output": "  "}, "its answer is empty"),
        ("supervised", SOUP | {"instruction": ""}, "its prompt is empty"),
        ("supervised", SOUP | {"output": None}, "column 'output' is null"),
        ("supervised", SOUP | {"output": 42}, "column 'output' is a number, wanted text"),
        (
            "supervised",
            SOUP | {"output": {"text": "a"}},
            "column 'output' has neither 'role' nor 'from'; found 'text'",
        ),
        ("supervised", SOUP | {"input": ["a"]}, "column 'input' is a list, wanted text"),
        (
            "supervised",
            SOUP | {"history": [["a"]]},
            "column 'history' is a list, wanted a list of pairs",
        ),
        (
            "supervised",
            SOUP | {"output": "half \ud800"},
            "column 'output' holds half of a surrogate pair",
        ),
        ("supervised", SOUP | {"id": 3}, "its id 3 is that of row 3 too"),
        (
            "supervised",
            {"conversations": []},
            (
                "its layout is sharegpt (conversations|conversation), and that of the rows before"
                " it alpaca"
            ),
        ),
        ("supervised", {"prompt": "a", "chosen": "b", "rejected": "c"}, "its layout is preference"),
        ("supervised", {}, "found the columns (none)"),
    ],
)
def test_a_broken_row_is_named_with_its_reason(want: str, row: object, reason: str, tmp_path: Path):
    file = jsonl([*(SOUP | {"id": n} for n in range(1, 7)), row, SOUP], tmp_path / "rows.jsonl")
    line = failure(file, want)
    assert ": 1 of 8 rows broken, 7 good; row 7: " in line and reason in line
    assert line.endswith("; fix them, or leave them out with skip_broken=true")
    report = ReadReport()
    assert [e.row for e in read_examples(file, want, skip_broken=True, report=report)] == [
        1,
        2,
        3,
        4,
        5,
        6,
        8,
    ]  # type: ignore[arg-type]
    assert (report.n_good, report.n_broken, report.problems[0].row, report.layout) == (
        7,
        1,
        7,
        "alpaca",
    )


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (
            "text",
            (
                "column 'messages' is text, wanted a list of turns; a table cannot hold turns, JSON"
                " lines can"
            ),
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
            "turn 1 (assistant) holds 'tool_calls', which is not read",
        ),
        (
            [{"role": "user", "content": "a"}],
            "it has no answer: its last turn is of user, wanted assistant",
        ),
        ([{"role": "user", "content": "a"}, said(" ")], "its answer is empty"),
        ([said("a")], "before the answer stands nothing; wanted a user's turn"),
        (
            [{"role": "user", "content": "a"}, said("b"), said("c")],
            "before the answer stands the turn of assistant",
        ),
        ([], "it has no answer: its last turn is of nothing"),
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
            "answers alone, and there is no prompt; add one of prompt, question",
        ),
        (
            "preference",
            {"prompt": "a", "chosen": [], "rejected": "c"},
            "does not end in an assistant's turn; it holds no turns",
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
            "column 'prompt' is not the prompt in the turns of chosen and rejected",
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
    assert "row 2: its number of answers is 1, not 2; give every row a substitute, or none" in line


def test_a_given_layout_wins_over_the_columns_or_is_refused(
    tmp_path: Path,
):
    row = {"prompt": "a", "completion": "b", "label": 3}
    file = jsonl([row], tmp_path / "rows.jsonl")
    assert "its layout is kto" in failure(file) and "no supervised rows" in failure(file)
    assert next(iter(read_examples(file, "supervised", layout="prompt_completion"))).answers == (
        "b",
    )
    line = failure(file, layout="alpaca")
    assert (
        "row 1: the given layout alpaca (instruction + output|response) does not fit; found the"
        " columns 'prompt', 'completion', 'label'" in line
    )
    names = line.split("nearest first, ")[1]
    assert names.startswith("prompt_completion (") and all(
        name in names for name in ("alpaca", "messages", "sharegpt")
    )
    assert "layout='alpca' is not known; did you mean 'alpaca'?" in failure(file, layout="alpca")
    assert f"layout='quite' is not known; accepted: auto, {', '.join(LAYOUTS)}" in failure(
        file, layout="quite"
    )
    assert (
        "layout='kto' holds no supervised rows; accepted: auto, alpaca, messages, sharegpt"
        in failure(file, layout="kto")
    )


def test_the_first_row_alone_does_not_decide_the_layout(tmp_path: Path):
    file = jsonl([{"instruction": "no answer"}, SOUP, SOUP], tmp_path / "rows.jsonl")
    report = ReadReport()
    assert len(list(read_examples(file, "supervised", skip_broken=True, report=report))) == 2
    assert "row 1: its layout is prompt (" in str(report)


def test_three_reasons_are_given_and_the_rest_is_counted(tmp_path: Path):
    bad = [
        SOUP | {"output": None},
        SOUP | {"output": ""},
        SOUP | {"output": None},
        "{",
        SOUP | {"instruction": 5},
    ]
    line = failure(jsonl([SOUP, *bad], tmp_path / "rows.jsonl"))
    assert (
        "5 of 6 rows broken, 1 good; row 2 and 1 more: column 'output' is null; row 3: its answer"
        " is empty; row 5: bad JSON" in line
    )
    assert "row 6" not in line


def test_skipped_rows_are_reported_and_cannot_be_all_rows(
    tmp_path: Path,
):
    with pytest.warns(
        UserWarning,
        match=r"1 of 2 rows broken, 1 good; row 2: bad JSON.*; the broken ones are left out",
    ):
        assert (
            len(
                list(
                    read_examples(
                        jsonl([SOUP, "{"], tmp_path / "rows.jsonl"), "supervised", skip_broken=True
                    )
                )
            )
            == 1
        )
    assert "1 of 1 rows broken, 0 good" in failure(
        jsonl(["{"], tmp_path / "rows.jsonl"), skip_broken=True
    )
    assert "holds no rows" in failure(jsonl([], tmp_path / "rows.jsonl"), skip_broken=True)


def test_reading_stops_at_the_first_broken_row_not_skipped(tmp_path: Path):
    rows = read_examples(jsonl([SOUP, SOUP, "{", SOUP], tmp_path / "rows.jsonl"), "supervised")
    assert [next(rows).row, next(rows).row] == [1, 2]
    with pytest.raises(TemperError, match="1 of 4 rows broken, 3 good"):
        next(rows)


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


def test_the_text_of_a_row_is_in_no_error(tmp_path: Path):
    long = "secret " * 400_000
    rows = [
        SOUP | {"output": [long]},
        SOUP | {long: "x"},
        {"messages": [{"role": long, "content": long}]},
        '{"a": "' + long,
    ]
    assert failure(jsonl(rows, tmp_path / "rows.jsonl")).count("secret") < 16


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["", "user", "assistant", "Soup?"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "loss_weight"]), inner
        )
    ),
    max_leaves=12,
)
columns = sorted(
    {name for layout in LAYOUTS.values() for group in layout.required for name in group}
    | {"system", "input", "history", "id"}
)


@given(
    rows=st.lists(st.dictionaries(st.sampled_from(columns), json_values), max_size=5),
    want=st.sampled_from(["supervised", "preference", "kto", "unlearning", "prompt"]),
)
def test_any_cells_are_examples_or_one_line(
    rows: list[dict], want: str, tmp_path_factory: pytest.TempPathFactory
):
    file = jsonl(rows, tmp_path_factory.mktemp("any") / "rows.jsonl")
    report = ReadReport()
    try:
        found = list(read_examples(file, want, skip_broken=True, report=report))  # type: ignore[arg-type]
    except TemperError as problem:
        assert "\n" not in str(problem) and not report.n_good
    else:
        assert len(found) == report.n_good and report.n_good + report.n_broken == len(rows)
        assert all(e.question.strip() or e.prompt[-1].role == "tool" for e in found)
        assert all(answer.strip() for e in found for answer in e.answers)


@pytest.mark.skipif(
    not (SHARED / "formats").is_dir(),
    reason="needs ../shared/data/formats, the demo files of LLaMA-Factory",
)
@pytest.mark.parametrize(
    ("name", "layout", "want", "n_rows"),
    [
        ("alpaca_en_demo.json", "alpaca", "supervised", 999),
        ("dpo_en_demo.json", "preference", "preference", 300),
        ("glaive_toolcall_en_demo.json", "sharegpt", "supervised", 300),
        ("kto_en_demo.json", "kto_messages", "kto", 300),
        ("v1_dpo_demo.jsonl", "preference_messages", "preference", 10),
        ("v1_sft_demo.jsonl", "messages", "supervised", 500),
    ],
)
def test_public_files_of_the_common_layouts_are_read_whole(
    name: str, layout: str, want: str, n_rows: int
):
    file = SHARED / "formats" / name
    assert describe_layout(file).name == layout
    assert (
        len(list(read_examples(file, want))) == len(list(read_examples(file, "prompt"))) == n_rows
    )  # type: ignore[arg-type]
