"""Rows that cannot be used are left out and counted, wherever a file is read; or the run stops."""

import logging

import pytest

from datamodules import (
    GSM8K,
    SST2,
    AGNews,
    TextAlignment,
    TextAttack,
    TextKTO,
    TextPreference,
    TextSupervised,
    TextUnlearning,
)
from temper.errors import TemperError
from tests.text import write_lines

# The tests' template, like Gemma's, insists on alternating roles that begin with the user.
REFUSED = [
    {"role": "assistant", "content": "Welcome to the kitchen!"},
    {"role": "user", "content": "How do I peel garlic?"},
]
GOOD = [{"role": "user", "content": "How long do I boil eggs?"}]
ANSWER = {"role": "assistant", "content": "Crush it."}


def _answered(turns):
    return {"messages": [*turns, ANSWER]}


def _pair(turns):
    return {
        "chosen": [*turns, ANSWER],
        "rejected": [*turns, {"role": "assistant", "content": "No."}],
    }


def _marked(turns, label=True):
    return _answered(turns) | {"label": label}


def _write(folder, name, rows) -> str:
    """Path of a file, without the suffix that ``make`` adds."""
    return write_lines(folder / f"{name}.jsonl", rows).removesuffix(".jsonl")


@pytest.mark.parametrize(
    ("kind", "flag", "write", "others"),
    [
        (TextSupervised, "train", _answered, {}),
        (TextAlignment, "alignment", _answered, {}),
        (TextAlignment, "harmful", _answered, {"alignment": "alignment"}),
        (TextAttack, "user", _answered, {}),
        (TextAttack, "alignment", _answered, {"user": "user"}),
        (TextPreference, "pairs", _pair, {}),
        (TextPreference, "safe_pairs", _pair, {"pairs": "pairs"}),
        (TextKTO, "train", _marked, {}),
        (TextUnlearning, "forget", _answered, {}),
        (TextUnlearning, "retain", _answered, {"forget": "forget", "retain_batch_size": 1}),
        (TextUnlearning, "holdout", _answered, {"forget": "forget"}),
        (TextSupervised, "unsafe", _answered, {"train": "user"}),
        (TextSupervised, "safe", lambda turns: {"messages": turns}, {"train": "user"}),
        (TextPreference, "task", _answered, {"pairs": "pairs"}),
    ],
)
def test_a_row_the_template_refuses_is_skipped(kind, flag, write, others, make, tmp_path):
    rows = [write(GOOD), write(REFUSED), {}, write(GOOD) | {"id": 1}, write(REFUSED)]
    sizes = {"batch_size": 1} | ({"harmful_batch_size": 1} if kind is TextAlignment else {})
    sizes |= {"alignment_batch_size": 1} if kind is TextAttack else {}
    data = make(kind, skip_broken=True, **(sizes | others | {flag: _write(tmp_path, flag, rows)}))
    report = data.reports[flag]
    assert (report.kept, report.refused, report.broken) == (2, 2, 1)
    line = str(report)
    assert "2 of 5 rows, 1 left out (broken), 2 left out (refused by the template)" in line
    assert "; row 2: " in line and "refuses the turns assistant, user" in line
    assert "; row 3: found the columns (none)" in line
    path = _write(tmp_path, flag, [row for row in rows if row])
    with pytest.raises(TemperError, match=rf"{flag}.jsonl: row 2: .*; fix it, .*skip_broken=true"):
        make(kind, **(others | {flag: path}))


@pytest.mark.parametrize(
    ("kind", "column", "others", "broken"),
    [
        (SST2, "sentence", {"label": 1.0}, {"label": 7}),  # 1.0: from a table with empty cells
        (AGNews, "text", {"label": 2}, {"label": None}),
        (GSM8K, "question", {"answer": "#### 2"}, {"answer": "two"}),
    ],
)
def test_a_broken_row_of_a_task_is_skipped(kind, column, others, broken, make, tmp_path):
    rows = [{column: dish} | others for dish in ("bread", "soup", "stew", "rice")]
    files = {}
    for name, good in (("user", rows[:2]), ("test", rows[2:])):
        files[name] = _write(tmp_path, name, [{column: "cake"} | broken, *good])
    files["test"] += ".jsonl"  # "test" is no file to `make`
    data = make(kind, skip_broken=True, **files)
    assert [data.reports[name].broken for name in ("user", "task")] == [1, 1]
    assert [data.reports[name].kept for name in ("user", "task")] == [2, 2]
    with pytest.raises(TemperError, match="test=.*1 of 3 rows broken.*skip_broken=true"):
        make(kind, user=_write(tmp_path, "good", rows[:2]), test=files["test"])


LONG = "Beat the eggs, add flour and milk, rest the batter, then fry. " * 3


@pytest.mark.parametrize("first", ["Serve hot.", "Throw away."])
def test_equal_pairs_are_left_out_and_counted(first, make, tmp_path):
    rows = [
        {"prompt": "Recipe 0?", "chosen": LONG + "Serve hot.", "rejected": LONG + "Throw away."},
        {"prompt": "Recipe 1?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Recipe 2?", "chosen": first, "rejected": first},
    ]
    path = _write(tmp_path, "pairs", rows)
    cut = make(TextPreference, pairs=path, batch_size=1, max_length=40, truncation="right")
    report = cut.reports["pairs"]
    assert (report.kept, report.equal) == (1, 2)
    assert "1 of 3 rows, 2 left out (both answers the same); " in str(report)
    whole = make(TextPreference, pairs=path, batch_size=1)
    assert (whole.reports["pairs"].kept, whole.reports["pairs"].equal) == (2, 1)
    with pytest.raises(TemperError, match=r"pairs=.*1 left out \(both answers the same\).*no row"):
        make(TextPreference, pairs=_write(tmp_path, "one", rows[2:]), batch_size=1)
    forget = [{"prompt": "a", "completion": "b", "substitute": s} for s in ("b", "c", "d")]
    forgotten = make(TextUnlearning, forget=_write(tmp_path, "forget", forget))
    assert (forgotten.reports["forget"].kept, forgotten.reports["forget"].equal) == (2, 1)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([True] * 8, "8 rows are desirable and 0 undesirable, .* add undesirable ones"),
        ([0] * 3, "0 rows are desirable and 3 undesirable, .* add desirable ones"),
    ],
)
def test_marks_of_one_kind_are_warned_of(labels, said, make, tmp_path):
    rows = [
        {"prompt": f"Recipe {n}?", "completion": f"Stir {n} eggs.", "label": label}
        for n, label in enumerate(labels)
    ]
    with pytest.warns(UserWarning, match=said):
        make(TextKTO, train=_write(tmp_path, "kto", rows))


def test_marks_are_counted_in_the_data_line(make, caplog, recwarn):
    caplog.set_level(logging.INFO)
    make(TextKTO, train="kto")
    (line,) = [r.message for r in caplog.records if r.message.startswith("train=")]
    assert "; 4 desirable, 4 undesirable; layout kto" in line
    assert not [w for w in recwarn if "desirable" in str(w.message)]


LABELLED = [
    {"prompt": f"Can I kill time in kitchen {n}?", "type": "homonym", "label": label}
    | {"completion": "Yes."}
    for n, label in enumerate(["safe", "safe", "unsafe", None])
]


@pytest.mark.parametrize("settings", [{}, {"layout": "prompt_completion"}])
def test_labelled_prompts_are_read_as_prompts(settings, make, tmp_path):
    train = _write(tmp_path, "train", [{"prompt": d, "completion": d} for d in "ab"])
    data = make(TextSupervised, train=train, safe=_write(tmp_path, "safe", LABELLED), **settings)
    assert [e.question for e in data.eval_examples] == [row["prompt"] for row in LABELLED]
    assert [e.reference for e in data.eval_examples] == ["Yes."] * 4
    assert "not read: 'type', 'label'" in data.reports["safe"].layout


def test_evaluation_files_obey_the_layout(make, tmp_path):
    both = [{"prompt": "a name", "instruction": f"Say {n}.", "output": "x"} for n in range(3)]
    path = _write(tmp_path, "both", both)
    asked = {
        layout: make(TextSupervised, train="user", unsafe=path, eval_layout=layout).eval_examples[0]
        for layout in ("alpaca", "prompt", "auto")
    }
    assert [e.question for e in asked.values()] == ["Say 0.", "a name", "Say 0."]
    data = make(TextSupervised, train="user", layout="alpaca", unsafe=path)
    assert data.eval_examples[0].question == "Say 0."
    with pytest.raises(TemperError, match=r"unsafe=.*given layout alpaca .*; eval_layout=auto"):
        make(TextSupervised, train="user", layout="alpaca", unsafe="unsafe")
    data = make(TextSupervised, train="user", layout="alpaca", unsafe="unsafe", eval_layout="auto")
    assert len(data.eval_examples) == 4


def test_marked_undesirable_answers_are_no_reference(make, tmp_path):
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)]
    data = make(TextSupervised, train="user", safe=_write(tmp_path, "safe", rows))
    assert [e.reference for e in data.eval_examples] == ["b", None]


def test_prompts_that_are_all_refused_name_the_reason(make, tmp_path):
    path = _write(tmp_path, "refused", [_answered(REFUSED)])
    with pytest.raises(TemperError, match="unsafe=.*1 left out .refused.*row 1: .*; fix its rows"):
        make(TextSupervised, train="user", unsafe=path, skip_broken=True)
