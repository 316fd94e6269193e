"""The token cache of a user's files, and the reports on what was read."""

import shutil

import pytest

from datamodules import (
    TextSupervised,
    TextUnlearning,
)
from temper.errors import TemperError
from tests.datamodules.text_rows import (
    DISHES,
    SAID,
    stream_texts,
)
from tests.text import make_tokenizer, write_lines


def test_the_cache_is_reused_until_anything_it_holds_changes(make, tmp_path, monkeypatch, folder):
    def n_pools(**arguments) -> int:
        make(TextSupervised, train="user", **arguments)
        return len(list((tmp_path / "cache").iterdir()))

    assert n_pools() == 1
    with monkeypatch.context() as patch:
        patch.setattr("temper.data.encode.Encoder.rows", lambda *_: pytest.fail("tokenised again"))
        assert n_pools(seed=3, n_eval=5, batch_size=4) == 1
    changes = [
        {"template": "alpaca"},
        {"system": "You bake."},
        {"max_length": 40},
        {"truncation": "left"},
        {"all_turns": True},
        {"layout": "alpaca"},
        {"skip_broken": True},
        {"drop_repeats": True},
    ]
    assert [n_pools(**change) for change in changes] == list(range(2, 10))
    shutil.copy(folder / "safe_pairs.jsonl", tmp_path / "other.jsonl")
    make_tokenizer("gemma", eos_token="<s>").save_pretrained(tmp_path / "tokenizer")
    assert n_pools(tokenizer=str(tmp_path / "tokenizer")) == 10
    for name, value in (
        ("temper.data.encode.ENCODING", 0),
        ("temper.data.encode.TRANSFORMERS", "0"),
    ):  # other code, perhaps other tokens
        monkeypatch.setattr(name, value)
        assert n_pools() == {0: 11, "0": 12}[value]


def test_reports_are_kept_with_the_cache(make):
    arguments = {"train": "user", "unsafe": "unsafe", "max_length": 21, "truncation": "drop"}
    first, again = (make(TextSupervised, **arguments) for _ in range(2))
    assert first.reports == again.reports and set(first.reports) == {"train", "unsafe"}
    report = first.reports["train"]
    assert (
        0 < report.kept == len(first.sources["train"].pool) < report.read == 12
        and report.kept + report.dropped == 12
    )
    assert str(report).endswith(
        "; layout alpaca, from the columns 'instruction', 'output' of row 1"
    )
    with pytest.raises(
        TemperError,
        match=(
            r"data.init_args.train=.*: 0 of 12 rows, 12 left out \(too long\); .*; no row is left"
        ),
    ):
        make(TextSupervised, train="user", max_length=5)


def test_columns_that_nothing_reads_are_named(make, folder):
    write_lines(
        folder / "context.jsonl",
        [{"prompt": f"Say {d}.", "completion": d, "context": "a kitchen"} for d in DISHES],
    )
    reports = make(
        TextSupervised,
        train="context",
        layout="prompt_completion",
        unsafe="context",
        overlap="report",
    ).reports
    for report in reports.values():
        assert (
            report.layout
            == "layout prompt_completion, from the columns 'prompt', 'completion' of row 1; not"
            " read: 'context'"
        )
    read = {
        name: make(kind, **{name: "forget"}).reports[name].layout
        for kind, name in ((TextUnlearning, "forget"), (TextSupervised, "train"))
    }
    assert read["forget"].endswith("columns 'prompt', 'completion', 'substitute' of row 1")
    assert read["train"].endswith("columns 'prompt', 'completion' of row 1; not read: 'substitute'")


def test_rows_that_repeat_are_counted_and_left_out_if_asked(make, folder):
    rows = [{"prompt": f"Say {d}.", "completion": d} for d in DISHES]
    write_lines(
        folder / "twice.jsonl", [*rows, *rows[:5], {"prompt": "Say bread.", "completion": "no"}]
    )
    kept, dropped = (
        make(TextSupervised, train="twice", drop_repeats=drop) for drop in (False, True)
    )
    assert len(kept.sources["train"].pool) == 18 and stream_texts(dropped, "train") == [
        *SAID,
        ("Say bread.", "no"),
    ]
    assert str(kept.reports["train"]).startswith("18 of 18 rows, 5 the same as an earlier one; ")
    assert str(dropped.reports["train"]).startswith(
        "13 of 18 rows, 5 left out (the same as an earlier one); "
    )


def test_broken_rows_leave_nothing_in_the_cache(make, folder, tmp_path):
    text = (folder / "user.jsonl").read_text().splitlines()
    (folder / "broken.jsonl").write_text("\n".join([*text[:5], "{", *text[5:]]))
    with pytest.raises(TemperError, match=r"data.init_args.train=.*broken.jsonl: .*row 6"):
        make(TextSupervised, train="broken")
    assert list((tmp_path / "cache").iterdir()) == []
    data = make(TextSupervised, train="broken", skip_broken=True)
    assert (data.reports["train"].broken, data.reports["train"].kept) == (1, 12)
    assert str(data.reports["train"]).startswith("12 of 13 rows, 1 left out (broken); ")
