"""Layouts are detected, explained and read back as they were written; broken rows are counted."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from temper.data.examples import Example, Message
from temper.data.files import ReadReport
from temper.data.layouts import LAYOUTS, describe_layout, read_examples
from temper.errors import TemperError
from tests.data.layout_cases import (
    FLAT,
    SOUP,
    WRITTEN,
    contents,
    failure,
    jsonl,
    openai,
    table,
    whole,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"


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
            assert describe_layout(file, want=want).name == layout  # type: ignore[arg-type]
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
        match="no row has a known layout; .*found the columns 'a'; expected",
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
            "its layout is sharegpt (conversations|conversation), and that of",
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


def test_a_given_layout_wins_over_the_columns_or_is_refused(tmp_path: Path):
    row = {"prompt": "a", "completion": "b", "label": 3}
    file = jsonl([row], tmp_path / "rows.jsonl")
    assert "its layout is kto" in failure(file) and "no supervised rows" in failure(file)
    assert next(iter(read_examples(file, "supervised", layout="prompt_completion"))).answers == (
        "b",
    )
    line = failure(file, layout="alpaca")
    assert "row 1: the given layout alpaca (instruction + output|response) does not fit" in line
    assert "'prompt', 'completion', 'label'" in line
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
    assert "5 of 6 rows broken, 1 good; row 2 and 1 more: column 'output' is null; row 3: " in line
    assert "; row 5: bad JSON" in line
    assert "row 6" not in line


def test_skipped_rows_are_reported_and_cannot_be_all_rows(tmp_path: Path):
    with pytest.warns(
        UserWarning,
        match="1 of 2 rows broken, 1 good; row 2: bad JSON.*left out",
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
    want=st.sampled_from(
        ["supervised", "preference", "kto", "unlearning", "unlearning_answer", "prompt"]
    ),
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
    assert describe_layout(file, want=want).name == layout  # type: ignore[arg-type]
    assert (
        len(list(read_examples(file, want))) == len(list(read_examples(file, "prompt"))) == n_rows
    )  # type: ignore[arg-type]


BOTH_STYLES = [
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_two_styles_in_one_struct_read_as_json_lines_are(kind: str, tmp_path: Path):
    whole_turn = dict.fromkeys(("from", "value", "role", "content"))
    padded = [
        {"conversations": [whole_turn | t for t in row["conversations"]]} for row in BOTH_STYLES
    ]
    file = jsonl(padded, tmp_path / "rows.jsonl")
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        file = tmp_path / "rows.parquet"
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(padded), file)
    found = contents(list(read_examples(file, "supervised")))
    bare = jsonl(BOTH_STYLES, tmp_path / "bare.jsonl")
    assert found == contents(list(read_examples(bare, "supervised"))) and len(found) == 2


@pytest.mark.parametrize(
    ("want", "row", "null"),
    [
        ("supervised", {"prompt": "a", "completion": "b"}, ("label", "chosen", "messages")),
        (
            "supervised",
            {"messages": openai([Message("user", "a"), Message("assistant", "b")])},
            ("instruction", "output", "system", "tools", "kto_tag"),
        ),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}, ("label", "completion")),
        ("prompt", {"instruction": "a"}, ("output", "input", "history", "label", "messages")),
    ],
)
def test_columns_that_are_all_null_are_as_absent(want: str, row: dict, null, tmp_path: Path):
    bare = jsonl([row] * 2, tmp_path / "bare.jsonl")
    file = jsonl([row | dict.fromkeys(null)] * 2, tmp_path / "rows.jsonl")
    found = [contents(list(read_examples(path, want))) for path in (file, bare)]  # type: ignore[arg-type]
    assert found[0] == found[1]
    assert describe_layout(file, want=want).name == describe_layout(bare, want=want).name  # type: ignore[arg-type]


def test_a_null_that_a_row_needs_is_named(tmp_path: Path):
    marked = {"prompt": "a", "completion": "b", "label": True}
    file = jsonl([marked, marked | {"label": None}], tmp_path / "rows.jsonl")
    assert "row 2: column 'label' is null" in failure(file, "kto")
    pair = {"prompt": "a", "chosen": "b", "rejected": None}
    assert "row 1: column 'rejected' is null" in failure(
        jsonl([pair], tmp_path / "rows.jsonl"), "preference"
    )
