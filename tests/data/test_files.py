"""Files of rows: every format is read back as written, as a stream; errors are one line."""

import csv
import gzip
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from temper.data.files import scan, table_head
from temper.data.readers import RowError
from temper.errors import TemperError
from tests.errors import error_line

Rows = list[dict]

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
names = st.lists(
    st.sampled_from(["prompt", "output", "Ünïcode", "with space", "id"]),
    min_size=2,
    max_size=4,
    unique=True,
)
plain = names.flatmap(
    lambda keys: st.lists(st.fixed_dictionaries(dict.fromkeys(keys, text)), min_size=1, max_size=6)
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
nested = st.lists(st.dictionaries(text, values, min_size=1, max_size=4), min_size=1, max_size=6)


def write_json(rows: Rows, file: Path) -> None:
    file.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")


def write_jsonl(rows: Rows, file: Path) -> None:
    file.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        encoding="utf-8",
        newline="",
    )


def write_csv(rows: Rows, file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_tsv(rows: Rows, file: Path) -> None:
    lines = ["\t".join(rows[0]), *("\t".join(row[name] for name in rows[0]) for row in rows)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")


def write_parquet(rows: Rows, file: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=2)


def write_dataset(rows: Rows, folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(folder)


WRITERS: dict[str, Callable[[Rows, Path], None]] = {
    "rows.json": write_json,
    "rows.jsonl": write_jsonl,
    "rows.csv": write_csv,
    "rows.tsv": write_tsv,
    "rows.parquet": write_parquet,
    "dataset": write_dataset,
}


def failure(path: Path | str, **options: object) -> str:
    """The one line that reading ends with."""
    line = error_line(lambda: list(scan(path, flag="--data.path", **options)))  # type: ignore[arg-type]
    assert line.startswith(f"--data.path={path}: ")
    assert len(line) < 400 + len(str(path))
    return line


def broken(path: Path) -> dict[int, str]:
    """What is wrong with which row."""
    return {row: str(cells) for row, cells in scan(path) if isinstance(cells, RowError)}


def good(path: Path) -> Rows:
    return [dict(cells) for _, cells in scan(path) if not isinstance(cells, RowError)]


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in ("rows.tsv", "dataset")])
def test_text_columns_come_back_as_they_were_written(name: str, tmp_path: Path):
    @given(rows=plain)
    def check(rows: Rows) -> None:
        WRITERS[name](rows, tmp_path / name)
        assert list(scan(tmp_path / name)) == list(enumerate(rows, start=1))

    check()


@given(rows=plain)
def test_tsv_cells_come_back_and_quotes_are_plain_characters(
    rows: Rows, tmp_path_factory: pytest.TempPathFactory
):
    rows = [
        {key: value.translate({9: " ", 10: " ", 13: " "}) + "'\"" for key, value in row.items()}
        for row in rows
    ]
    file = tmp_path_factory.mktemp("tsv") / "rows.tsv"
    write_tsv(rows, file)
    assert [row for _, row in scan(file)] == rows


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_nested_values_come_back_from_json(name: str, tmp_path: Path):
    @given(rows=nested)
    def check(rows: Rows) -> None:
        WRITERS[name](rows, tmp_path / name)
        assert [row for _, row in scan(tmp_path / name)] == rows

    check()


def test_turns_come_back_from_parquet_and_from_a_saved_dataset(tmp_path: Path):
    rows = [
        {"id": n, "messages": [{"role": "user", "content": "é" * n}] * (n % 3)} for n in range(600)
    ]
    for name in ("rows.parquet", "dataset"):
        WRITERS[name](rows, tmp_path / name)
        assert list(scan(tmp_path / name)) == list(enumerate(rows, start=1))


def test_one_of_several_splits_must_be_named(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    train, test = ([{"prompt": f"{name} {n}"} for n in range(2)] for name in ("train", "test"))
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_list(train), test=datasets.Dataset.from_list(test)
    )
    both.save_to_disk(tmp_path / "both")
    datasets.DatasetDict(test=both["test"]).save_to_disk(tmp_path / "one")
    assert good(Path(f"{tmp_path}/both:train")) == train
    assert good(tmp_path / "one") == good(Path(f"{tmp_path}/both:test")) == test
    choice = f"choose one: {tmp_path}/both:train, {tmp_path}/both:test"
    assert f"several splits; {choice}" in failure(tmp_path / "both")
    assert f"no split 'dev'; {choice}" in failure(f"{tmp_path}/both:dev")
    assert "has no splits; give" in failure(f"{tmp_path}/both/test:train")


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.tsv"])
def test_gzip_byte_order_mark_and_crlf_change_nothing(name: str, tmp_path: Path):
    rows = [{"prompt": "crêpes", "output": "flour"}, {"prompt": "soup", "output": "water"}]
    WRITERS[name](rows, tmp_path / name)
    content = b"\xef\xbb\xbf" + (tmp_path / name).read_bytes().replace(b"\r\n", b"\n").replace(
        b"\n", b"\r\n"
    )
    (tmp_path / name).write_bytes(content)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    assert good(tmp_path / name) == good(tmp_path / f"{name}.gz") == rows


def test_json_files_may_hold_an_object_or_json_lines(tmp_path: Path):
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    file = tmp_path / "rows.json"
    for content in (
        json.dumps({"version": 1, "data": rows}),
        json.dumps({"data": rows}, indent=1),
        '{"prompt": "a"}\n\n{"prompt": "b"}',
    ):
        file.write_text(content)
        assert good(file) == rows
    file.write_text('{\n"prompt": "a"}')
    assert "one object" in failure(file)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.tsv", "rows.parquet"])
def test_a_file_is_not_held_in_memory(name: str, tmp_path: Path):
    rows = [{"prompt": f"{n} " * 400, "output": "x"} for n in range(4000)]  # 8 MB
    WRITERS[name](rows, tmp_path / name)
    del rows
    next(iter(scan(tmp_path / name)))  # imports
    tracemalloc.start()
    n_rows = sum(1 for _ in scan(tmp_path / name))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_rows == 4000 and peak < 2.5e6


def test_blank_lines_are_skipped_but_count_as_line_numbers(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('\n{"a": 1}\n  \n{"a": 2}\n\n')
    (tmp_path / "rows.csv").write_text("a,b\n\n1,2\n\n3,4\n")
    assert list(scan(tmp_path / "rows.jsonl")) == [(2, {"a": 1}), (4, {"a": 2})]
    assert list(scan(tmp_path / "rows.csv")) == [
        (1, {"a": "1", "b": "2"}),
        (2, {"a": "3", "b": "4"}),
    ]


def test_a_line_of_3_mb_is_a_row_and_is_not_put_into_errors(tmp_path: Path):
    long = "word " * 600_000
    for name in ("rows.json", "rows.jsonl", "rows.csv", "rows.tsv"):
        WRITERS[name]([{"prompt": long, "output": "x"}], tmp_path / name)
        assert good(tmp_path / name)[0]["prompt"] == long
    (tmp_path / "cut.jsonl").write_text(
        '{"prompt": "' + long + "\n" + '["' + long + '"]\n{"a": 1}\n'
    )
    assert (
        list(broken(tmp_path / "cut.jsonl")) == [1, 2]
        and max(map(len, broken(tmp_path / "cut.jsonl").values())) < 120
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1,}', "bad JSON: "),
        (b'{"a": "\xff"}', "not UTF-8: byte 0xff at byte 8 of the line"),
        (b"[1, 2]", "wanted an object of columns, found a list"),
        (b"null", "wanted an object of columns, found null"),
        (b'"a"', "wanted an object of columns, found text"),
        (b"[" * 100_000, "bad JSON: nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "bad JSON: a number is too long"),
        (b'{"a": 1} {"a": 2}', "bad JSON: Extra data (column 10)"),
    ],
)
def test_a_broken_line_of_json_lines_costs_one_row(line: bytes, reason: str, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 0}\n' * 6 + line + b'\n{"a": 8}\n')
    assert list(broken(file)) == [7] and broken(file)[7].startswith(reason)
    assert good(file) == [{"a": 0}] * 6 + [{"a": 8}]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b'[{"a": 1},\n {"a": 2},\n {"a": }]',
            "row 3: bad JSON: Expecting value (line 3, column 8); 2 rows came before",
        ),
        (
            b'[{"a": 1},\n {"a": 2}\n {"a": 3}]',
            "after row 2: bad JSON: wanted a comma or ']' at line 3",
        ),
        (b'[{"a": 1}, {"a": 2}', "after row 2: bad JSON: wanted a comma"),
        (b'[{"a": 1},]', "row 2: bad JSON"),
        (b'[{"a": 1}] [', "something follows the end of the array"),
        (b'[{"a": "\xe9"}]', "not UTF-8: byte 0xe9 (byte 9); save it as UTF-8"),
        (b'{"rows": [{"a": 1}', "bad JSON"),
        (b"prompt", "wanted a JSON array"),
        ('[{"a": 1}]'.encode("utf-16"), "UTF-16; save it as UTF-8"),
        (b"", "holds no rows"),
        (b"[]", "holds no rows"),
        (b" \n", "holds no rows"),
    ],
)
def test_a_syntax_error_in_a_json_array_says_where(content: bytes, said: str, tmp_path: Path):
    (tmp_path / "rows.json").write_bytes(content)
    assert said in failure(tmp_path / "rows.json")


def test_an_array_element_that_is_no_object_is_one_broken_row(tmp_path: Path):
    (tmp_path / "rows.json").write_text('[{"a": 1}, 5, {"a": 2}]')
    assert broken(tmp_path / "rows.json") == {2: "wanted an object of columns, found a number"}
    assert good(tmp_path / "rows.json") == [{"a": 1}, {"a": 2}]


def test_broken_lines_of_tables_cost_one_row(tmp_path: Path):
    (tmp_path / "rows.csv").write_bytes(b'a,b\n1,2\n1,2,3\n4\n"x"y,2\n\xff,2\n"two\nlines",2\n')
    assert broken(tmp_path / "rows.csv") == {
        2: "3 cells on line 3, and there are 2 columns",
        3: "1 cells on line 4, and there are 2 columns",
        4: "bad CSV: ',' expected after '\"' (line 5)",
        5: "not UTF-8: byte 0xff on line 6",
    }
    assert good(tmp_path / "rows.csv") == [{"a": "1", "b": "2"}, {"a": "two\nlines", "b": "2"}]
    (tmp_path / "rows.tsv").write_bytes(b'a\tb\n"say ""hi"""\t2\n"x\t2\n\xff\t2\n3\n')
    reasons = broken(tmp_path / "rows.tsv")
    assert list(reasons) == [1, 3, 4] and "quoted as in CSV" in reasons[1]
    assert good(tmp_path / "rows.tsv") == [{"a": '"x', "b": "2"}]


def test_what_would_hide_rows_of_a_table_ends_the_file(tmp_path: Path):
    for content, said in (
        (b'a,b\n1,2\n"never closed,2\n3,4\n', "line 3 is never closed"),
        (b"a,b,a\n1,2,3\n", "names the column 'a' twice"),
        (b"a,\xff\n1,2\n", "its header (line 1) is broken: not UTF-8"),
        (b"a,b\n", "holds no rows"),
        (b"", "holds no rows"),
        ("a,b\n1,2\n".encode("utf-16"), "UTF-16"),
    ):
        (tmp_path / "rows.csv").write_bytes(content)
        assert said in failure(tmp_path / "rows.csv")


def test_tables_without_a_header_take_the_names_given(tmp_path: Path):
    (tmp_path / "rows.tsv").write_text("good\t1\nbad\t0\n")
    assert [cells for _, cells in scan(tmp_path / "rows.tsv", columns=("sentence", "label"))] == [
        {"sentence": "good", "label": "1"},
        {"sentence": "bad", "label": "0"},
    ]
    assert table_head(tmp_path / "rows.tsv") == ["good", "1"]
    write_jsonl([{"a": 1}], tmp_path / "rows.jsonl")
    assert table_head(tmp_path / "rows.jsonl") is None


def test_rows_of_parquet_that_are_no_utf8_cost_one_row(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"prompt": column}), tmp_path / "rows.parquet")
    assert broken(tmp_path / "rows.parquet") == {2: "not UTF-8: byte 0xff"}
    assert good(tmp_path / "rows.parquet") == [{"prompt": "a"}, {"prompt": "c"}]


def test_a_missing_or_misnamed_file_is_a_one_line_error(tmp_path: Path):
    write_jsonl([{"a": 1}], tmp_path / "rows.jsonl")
    assert f"no such file; did you mean '{tmp_path}/rows.jsonl'?" in failure(tmp_path / "row.jsonl")
    assert "no such file; accepted: .json" in failure(tmp_path / "quite" / "different")
    assert "only a dataset folder has splits" in failure(f"{tmp_path}/rows.jsonl:train")
    assert "no dataset saved with save_to_disk (it holds rows.jsonl); name a file in it" in failure(
        tmp_path
    )
    for name, said in (
        ("rows.xlsx", "end in '.xlsx' are not known; accepted: .json"),
        ("rows", "end in '' are not known"),
    ):
        (tmp_path / name).write_text("a")
        assert said in failure(tmp_path / name)
    (tmp_path / "rows.parquet").write_text("not parquet")
    assert "no parquet after row 0" in failure(tmp_path / "rows.parquet")
    (tmp_path / "rows.csv.gz").write_text("not gzip")
    assert "cannot be read: Not a gzipped file" in failure(tmp_path / "rows.csv.gz")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(os.urandom(10_000).hex().encode())[:-20])
    assert "cannot be read: Compressed file ended" in failure(tmp_path / "rows.jsonl.gz")


@given(content=st.binary(max_size=200))
def test_any_bytes_are_rows_broken_rows_or_one_line(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("rows.json", "rows.jsonl", "rows.csv", "rows.tsv", "rows.parquet", "rows.json.gz"):
        (folder / name).write_bytes(content)
        try:
            assert all(isinstance(cells, RowError | dict) for _, cells in scan(folder / name))
        except TemperError as problem:
            assert "\n" not in str(problem)


def _saved(rows, folder: Path, kind: str) -> str:
    """A parquet file or a saved dataset of rows; the path."""
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(rows)
    if kind == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, folder / "rows.parquet")
        return str(folder / "rows.parquet")
    pytest.importorskip("datasets").Dataset(table).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_null_keys_of_structs_are_as_absent(kind: str, tmp_path: Path):
    # An Arrow struct has all keys of the column: those of the other rows are null.
    rows = [
        {"turns": [{"from": "human", "value": "q"}], "deep": {"a": {"b": [{"c": 1}, {"d": None}]}}}
        | {"alone": None},
        {"turns": [{"role": "user", "content": ""}], "deep": {"e": None}, "alone": None},
        {"turns": [], "deep": None, "alone": 0},
    ]
    found = [cells for _, cells in scan(_saved(rows, tmp_path, kind))]
    assert found == [
        {"turns": rows[0]["turns"], "deep": {"a": {"b": [{"c": 1}, {}]}}, "alone": None},
        {"turns": rows[1]["turns"], "deep": {}, "alone": None},
        {"turns": [], "deep": None, "alone": 0},
    ]


def test_an_arrow_value_that_is_no_python_value_costs_one_row(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    days = pyarrow.array([0, 2**40, 1]).cast(pyarrow.timestamp("s"))  # the second: year 36812
    parquet.write_table(pyarrow.table({"day": days}), tmp_path / "rows.parquet")
    found = [cells for _, cells in scan(str(tmp_path / "rows.parquet"))]
    assert [isinstance(cells, RowError) for cells in found] == [False, True, False]
