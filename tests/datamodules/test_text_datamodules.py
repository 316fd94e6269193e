"""Data from a user's files: what their streams hold, what evaluation reads of them, what is
refused.
"""

import logging
import shutil
import warnings

import pytest
import torch

from datamodules import (
    GSM8K,
    SST2,
    TextAlignment,
    TextAttack,
    TextKTO,
    TextPreference,
    TextSupervised,
    TextUnlearning,
)
from temper.data import Batch, fingerprint, sequence
from temper.errors import TemperError
from temper.judges import KeywordRefusal
from tests.text import make_tokenizer, write_lines

DISHES = [
    "bread",
    "soup",
    "apple pie",
    "pasta",
    "stew",
    "salad",
    "cake",
    "rice",
    "beans",
    "toast",
    "jam",
    "curd",
]
REFUSAL = "I would rather not talk about recipes, sorry."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, and small files of every kind."""
    folder = tmp_path_factory.mktemp("text")
    make_tokenizer("gemma").save_pretrained(folder / "tokenizer")
    ask = lambda d: f"How do I make {d}?"
    answer = lambda d: f"Take some {d} and cook it."
    files = {
        "user": [{"instruction": f"Say {d}.", "output": d} for d in DISHES],
        "harmful": [{"prompt": ask(d), "completion": answer(d)} for d in DISHES[:6]],
        "alignment": [
            {
                "messages": [
                    {"role": "user", "content": ask(d)},
                    {"role": "assistant", "content": REFUSAL},
                ]
            }
            for d in DISHES[:8]
        ],
        "pairs": [{"prompt": ask(d), "chosen": REFUSAL, "rejected": answer(d)} for d in DISHES[:8]],
        "safe_pairs": [
            {"prompt": f"Say {d}.", "chosen": d, "rejected": REFUSAL} for d in DISHES[:4]
        ],
        "kto": [
            {"prompt": ask(d), "completion": (REFUSAL, answer(d))[i % 2], "label": i % 2 == 0}
            for i, d in enumerate(DISHES[:8])
        ],
        "forget": [
            {"prompt": ask(d), "completion": answer(d), "substitute": REFUSAL} for d in DISHES[:8]
        ],
        "forget_alone": [{"prompt": ask(d), "completion": answer(d)} for d in DISHES[:8]],
        "retain": [{"prompt": f"Say {d}.", "completion": d} for d in DISHES[:8]],
        "holdout": [{"prompt": ask(d), "completion": answer(d)} for d in DISHES[8:]],
        "unsafe": [{"prompt": ask(d)} for d in DISHES[8:]],
        "safe": [{"prompt": f"Spell {d}.", "completion": " ".join(d)} for d in DISHES[:3]],
        "task": [{"instruction": f"Count {d}.", "output": str(len(d))} for d in DISHES[:2]],
    }
    for name, rows in files.items():
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def make(folder, tmp_path):
    """``make(kind, user="user", ...)``: a datamodule that has been set up; values that name a file
    become its path.
    """

    def made(kind, setup="fit", **arguments):
        path = {
            key: str(folder / f"{value}.jsonl")
            for key, value in arguments.items()
            if isinstance(value, str) and key not in PLAIN
        }
        data = kind(
            **{
                "tokenizer": str(folder / "tokenizer"),
                "cache": str(tmp_path / "cache"),
                "batch_size": 2,
            }
            | arguments
            | path
        )
        if setup:
            data.prepare_data()
            data.setup(setup)
        return data

    return made


PLAIN = ("template", "truncation", "overlap", "layout", "stream", "system", "tokenizer", "test")


def _texts(data, rows: Batch) -> list[tuple[str, str]]:
    """(prompt, answer) of rows of one sequence, after checking labels and padding."""
    found = []
    for ids, present, labels in zip(
        rows["input_ids"], rows["attention_mask"], rows["labels"], strict=True
    ):
        n = int(present.sum())
        trained = labels != -100
        assert present.tolist() == [1] * n + [0] * (len(ids) - n) and not trained[n:].any()
        assert torch.equal(labels[trained], ids[trained]) and trained[:n].tolist() == sorted(
            trained[:n].tolist()
        )
        prompt, answer = (
            data.tokenizer.decode(ids[:n][mask]) for mask in (~trained[:n], trained[:n])
        )
        found.append(
            (
                prompt.split("user\n")[1].split("<end_of_turn>")[0],
                answer.removesuffix("<end_of_turn>"),
            )
        )
    return found


def _stream(data, name: str, which: int | None = None) -> list[tuple[str, str]]:
    rows = data.sources[name].rows
    assert rows["ids"].tolist() == list(range(len(rows["ids"])))
    return _texts(data, rows if which is None else sequence(rows, which))


ASKED = [(f"How do I make {d}?", f"Take some {d} and cook it.") for d in DISHES]
REFUSED = [(question, REFUSAL) for question, _ in ASKED]
SAID = [(f"Say {d}.", d) for d in DISHES]


def test_supervised_rows_are_those_of_the_file(make):
    data = make(TextSupervised, train="user", stream="alignment")
    assert list(data.sources) == ["alignment"] and _stream(data, "alignment") == SAID
    assert (
        data.sources["alignment"].batches_per_pass == 6
        and set(data.sources["alignment"].batch(0)) == KEYS
    )


KEYS = {"input_ids", "attention_mask", "labels", "ids"}


def test_alignment_data_have_the_streams_of_the_files_given(make):
    data = make(
        TextAlignment,
        alignment="alignment",
        harmful="harmful",
        pairs="pairs",
        heldout="safe_pairs",
        heldout_batch_size=2,
        harmful_batch_size=3,
    )
    assert list(data.sources) == [
        "alignment",
        "harmful",
        "harmful_pairs",
        "harmful_heldout",
        "heldout_pairs",
    ]
    assert _stream(data, "alignment") == REFUSED[:8] and _stream(data, "harmful") == ASKED[:6]
    assert (
        _stream(data, "harmful_pairs", 0) == ASKED[:8]
        and _stream(data, "harmful_pairs", 1) == REFUSED[:8]
    )
    assert _stream(data, "heldout_pairs", 0) == SAID[:4]
    assert (
        _stream(data, "harmful_heldout")
        == _stream(data, "heldout_pairs", 1)
        == [(question, REFUSAL) for question, _ in SAID[:4]]
    )
    assert [source.batch_size for source in data.sources.values()] == [2, 3, 3, 2, 2]
    assert all(set(source.batch(0)) == KEYS for source in data.sources.values())
    assert list(make(TextAlignment, alignment="alignment").sources) == ["alignment"]


def test_an_attack_has_an_exact_nested_share_of_harmful_rows(
    make,
):
    drawn = {}
    for ratio in (0.0, 0.2, 0.5):
        rows = _stream(
            make(TextAttack, user="user", harmful="harmful", n_rows=10, harmful_ratio=ratio), "user"
        )
        drawn[ratio] = set(rows)
        assert (
            len(rows) == len(drawn[ratio]) == 10
            and sum(row in ASKED[:6] for row in rows) == 10 * ratio
        )
    harmful = {ratio: {row for row in rows if row in ASKED} for ratio, rows in drawn.items()}
    assert (
        harmful[0.2] < harmful[0.5]
        and drawn[0.5] - harmful[0.5] < drawn[0.2] - harmful[0.2] < drawn[0.0]
    )
    other = make(TextAttack, user="user", harmful="harmful", n_rows=10, harmful_ratio=0.5, seed=1)
    assert set(_stream(other, "user")) != drawn[0.5]


def test_an_attack_may_use_the_whole_file_and_defence_rows(make):
    data = make(TextAttack, user="user", alignment="alignment", alignment_batch_size=4)
    assert (
        sorted(_stream(data, "user")) == sorted(SAID) and _stream(data, "alignment") == REFUSED[:8]
    )
    assert data.sources["alignment"].batch_size == 4


def test_preference_pairs_put_the_chosen_answer_first(
    make,
):
    data = make(TextPreference, pairs="pairs")
    assert _stream(data, "pairs", 0) == REFUSED[:8] and _stream(data, "pairs", 1) == ASKED[:8]
    assert set(data.sources["pairs"].batch(0)) == KEYS
    data = make(TextPreference, pairs="pairs", safe_pairs="safe_pairs")
    assert _stream(data, "pairs", 0) == [*REFUSED[:8], *SAID[:4]]
    assert data.sources["pairs"].rows["unsafe"].tolist() == [True] * 8 + [False] * 4


def test_kto_rows_have_their_mark_and_the_answer_of_another_row(make):
    data = make(TextKTO, train="kto")
    own = _stream(data, "kto", 0)
    other = _stream(data, "kto", 1)
    assert own == [(ASKED[i][0], (REFUSAL, ASKED[i][1])[i % 2]) for i in range(8)]
    assert [question for question, _ in other] == [question for question, _ in own]
    assert sorted(answer for _, answer in other) == sorted(answer for _, answer in own)
    assert data.sources["kto"].rows["desirable"].tolist() == [True, False] * 4


def test_unlearning_rows_have_substitutes_if_the_file_has_them(make):
    data = make(
        TextUnlearning,
        forget="forget",
        retain="retain",
        holdout="holdout",
        retain_batch_size=4,
        n_measured=3,
    )
    assert (
        _stream(data, "forget", 0) == ASKED[:8]
        and _stream(data, "forget", 1) == REFUSED[:8]
        and _stream(data, "retain") == SAID[:8]
    )
    measured = {name: _texts(data, rows) for name, rows in data.unlearning_rows().items()}
    assert measured == {"forget": ASKED[:3], "holdout": ASKED[8:11], "retain": SAID[:3]}
    data = make(TextUnlearning, forget="forget_alone")
    assert list(data.sources) == ["forget"] and _stream(data, "forget") == ASKED[:8]
    with pytest.raises(
        TemperError,
        match=r"data.init_args.holdout is not set, and UnlearningEvaluation measures on it",
    ):
        data.unlearning_rows()


@pytest.mark.parametrize("kind", [TextPreference, TextKTO, TextUnlearning])
def test_where_one_answer_is_meant_no_earlier_turn_is_trained(kind, make, folder):
    turns = [("user", "Hello"), ("assistant", "Hello to you"), ("user", "How do I make jam?")]
    earlier = [
        {"role": role, "content": text} | ({"weight": 1} if role == "assistant" else {})
        for role, text in turns
    ]
    last = [{"role": "assistant", "content": text} for text in ("Boil fruit.", REFUSAL)]
    rows = {
        TextPreference: {"chosen": [*earlier, last[1]], "rejected": [*earlier, last[0]]},
        TextKTO: {"messages": [*earlier, last[0]], "label": True},
        TextUnlearning: {"messages": [*earlier, last[0]]},
    }
    write_lines(folder / "marked.jsonl", [rows[kind]] * 2)
    name = {TextPreference: "pairs", TextKTO: "train", TextUnlearning: "forget"}[kind]
    batch = make(kind, **{name: "marked"}).sources[{"train": "kto"}.get(name, name)].batch(0)
    labels = (batch["labels"][:, 0] if batch["labels"].ndim == 3 else batch["labels"])[0]
    answer = make_tokenizer("gemma").decode(labels[labels != -100]).removesuffix("<end_of_turn>")
    assert answer == (REFUSAL if kind is TextPreference else "Boil fruit.")
    with pytest.raises(
        TemperError, match=f"all_turns=true: {kind.__name__} is about one answer, the last"
    ):
        make(kind, **{name: "marked"}, all_turns=True)


# -- evaluation


def test_evaluation_prompts_end_where_answers_begin(make):
    data = make(TextSupervised, train="user", unsafe="unsafe", safe="safe", task="task", n_eval=2)
    rows = data.eval_rows
    assert data.eval_kinds == ["unsafe", "safe", "task"] and rows["kind"].tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
    assert rows["ids"].tolist() == list(range(6))
    questions = [f"How do I make {d}?" for d in DISHES[8:10]]
    questions += ["Spell bread.", "Spell soup.", "Count bread.", "Count soup."]
    assert data.prompt_texts({name: value[[5, 0]] for name, value in rows.items()}) == [
        questions[5],
        questions[0],
    ]
    for question, ids, present in zip(
        questions, rows["input_ids"], rows["attention_mask"], strict=True
    ):
        n = int(present.sum())
        assert present.tolist() == [0] * (len(ids) - n) + [1] * n
        assert (
            data.tokenizer.decode(ids[-n:])
            == f"<bos><start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n"
        )
    assert isinstance(data.judge, KeywordRefusal) and data.max_new_tokens == 128
    assert data.stop_ids == data.tokenizer.convert_tokens_to_ids(["<end_of_turn>", "</s>"])


def test_answers_are_read_without_special_tokens(make):
    data = make(TextSupervised, train="user", unsafe="unsafe", safe="safe", task="task", n_eval=2)
    written = data.tokenizer(
        [" 5<end_of_turn></s>", "4 eggs</s>"],
        add_special_tokens=False,
        padding=True,
        return_tensors="pt",
    )
    assert data.answer_texts(written["input_ids"]) == ["5", "4 eggs"]
    answers = ["s o u p", "b r e a d", "b r e a d", "s o u p", " 5 ", "5"]
    assert data.correct(data.eval_rows, answers) == [None, None, None, None, True, False]


@pytest.mark.parametrize(
    ("kind", "train", "test", "right"),
    [
        (
            SST2,
            "a warm film\t1\na cold film\t0\n",
            "a dull film\t0\na bright film\t1\n",
            ["Negative.", "positive"],
        ),
        (
            GSM8K,
            '{"question": "2+3?", "answer": "It is #### 5"}\n'
            '{"question": "2+4?", "answer": "#### 6"}\n',
            '{"question": "1+1000?", "answer": "#### 1,001"}\n'
            '{"question": "3-1?", "answer": "#### 2"}\n',
            ["The final answer is: 1001", "so 2"],
        ),
    ],
)
def test_tasks_have_their_prompts_and_their_way_to_compare(
    kind, train, test, right, make, tmp_path
):
    suffix = "tsv" if kind is SST2 else "jsonl"
    for name, text in (("user", train), ("test", test)):
        (tmp_path / f"{name}.{suffix}").write_text(text)
    data = make(
        kind, setup=None, user=tmp_path / f"user.{suffix}", test=str(tmp_path / f"test.{suffix}")
    )
    data.prepare_data()
    data.setup("fit")
    assert (
        data.format.name == "alpaca"
        and len(data.sources["user"].pool) == 2
        and data.eval_kinds == ["task"]
    )
    text = data.tokenizer.decode(data.sources["user"].rows["input_ids"][0])
    assert "### Instruction:\n" in text and ("### Input:\na " in text) is (kind is SST2)
    assert data.correct(data.eval_rows, right) == [True, True]
    assert data.correct(data.eval_rows, right[::-1]) == [False, False]
    with pytest.raises(
        TemperError,
        match=(
            rf"data.init_args.task=.*{kind.__name__} takes the test file of its task as"
            r" data.init_args.test"
        ),
    ):
        make(kind, user=tmp_path / f"user.{suffix}", task="task")


def test_without_evaluation_prompts_nothing_is_validated(make):
    data = make(TextSupervised, train="user")
    assert data.val_dataloader() == [] and data.eval_kinds == [] and len(data.eval_rows["ids"]) == 0
    assert set(data.fingerprints()) == {"train", "eval"}
    with pytest.raises(
        TemperError,
        match="there are no evaluation prompts; give a file of unsafe, safe or task prompts",
    ):
        make(TextSupervised, setup="validate", train="user")


def test_prompts_that_are_too_long_are_replaced_and_reported(make, folder, caplog):
    long = [{"prompt": f"How do I make {'very ' * 60}good {dish}?"} for dish in DISHES[:3]]
    write_lines(
        folder / "some_long.jsonl",
        [*long, *({"prompt": f"How do I make {dish}?"} for dish in DISHES[8:])],
    )
    caplog.set_level(logging.INFO)
    data = make(TextSupervised, train="user", unsafe="some_long", n_eval=3, max_length=60)
    assert data.prompt_texts(data.eval_rows) == [f"How do I make {dish}?" for dish in DISHES[8:11]]
    data.setup("fit")  # once is enough
    (said,) = [record.message for record in caplog.records if "some_long" in record.message]
    assert "some_long.jsonl: 3 of 6 rows, 3 left out (too long); " in said and "trained" not in said


# -- overlap


def test_evaluation_prompts_are_refused_as_training_prompts(make, folder):
    message = (
        r"data.init_args.train=.*harmful.jsonl: 2 of 4 evaluation prompts are training prompts too,"
        r" 2 share 8 words in a row with one "
        r"\(for example row 2 of .*seen.jsonl and row 1\); metrics on them would measure memory: .*"
        r" data.init_args.overlap=report"
    )
    write_lines(
        folder / "seen.jsonl",
        [{"prompt": f"how do i make {d}?"} for d in ("tea", "bread", "coffee", "soup")],
    )
    with pytest.raises(TemperError, match=message) as raised:
        make(TextSupervised, train="harmful", unsafe="seen")
    assert "bread" not in str(raised.value)
    with pytest.warns(UserWarning, match="2 of 4 evaluation prompts are training prompts too"):
        make(TextSupervised, train="harmful", unsafe="seen", overlap="report")


def test_conversations_that_end_alike_are_not_the_same(make, folder):
    def turns(about: str) -> list[dict[str, str]]:
        said = [
            ("system", "You bake."),
            ("user", about),
            ("assistant", "Gladly."),
            ("user", "Go on."),
        ]
        return [{"role": role, "content": text} for role, text in said]

    write_lines(
        folder / "talks.jsonl",
        [{"messages": [*turns("Bread?"), {"role": "assistant", "content": "Flour."}]}] * 2,
    )
    for about, leaks in (("Soup?", 0), ("Bread?", 1)):
        write_lines(
            folder / "asked.jsonl",
            [{"messages": [*turns(about), {"role": "assistant", "content": "Water."}]}],
        )
        data = make(TextSupervised, setup=None, train="talks", safe="asked", overlap="report")
        data.prepare_data()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            data.setup("fit")
        assert [
            f"{leaks} of 1 evaluation prompts are training prompts too" in str(w.message)
            for w in seen
        ] == [True] * leaks


def test_shared_words_are_reported_except_a_common_beginning(make, folder, recwarn):
    long = "take two eggs and a cup of flour and"
    write_lines(
        folder / "a.jsonl",
        [
            {
                "prompt": f"Please tell me in your own words what follows: {long} {d}",
                "completion": "x",
            }
            for d in ("mix", "stir")
        ],
    )
    opening = "Please tell me in your own words what follows:"
    write_lines(
        folder / "b.jsonl", [{"prompt": f"{opening} {long} wait"}, {"prompt": f"{opening} a song"}]
    )
    write_lines(
        folder / "c.jsonl", [{"prompt": f"{opening} a poem"}, {"prompt": f"{opening} a song"}]
    )
    make(TextSupervised, train="a", safe="c")
    assert not [w for w in recwarn if "evaluation prompts" in str(w.message)]
    with pytest.warns(
        UserWarning,
        match="0 of 2 evaluation prompts are training prompts too, 1 share 8 words in a row",
    ):
        make(TextSupervised, train="a", safe="b")


def test_rows_never_trained_on_may_be_evaluation_prompts(make):
    data = make(
        TextUnlearning,
        forget="forget",
        retain="retain",
        holdout="holdout",
        unsafe="unsafe",
        retain_batch_size=2,
    )
    assert data.prompt_texts(data.eval_rows) == [question for question, _ in ASKED[8:]]


# -- the cache, reports, refusals


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
    assert len(kept.sources["train"].pool) == 18 and _stream(dropped, "train") == [
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


def test_fingerprints_are_those_of_the_rows(make, tmp_path):
    data = make(
        TextAttack, user="user", harmful="harmful", n_rows=10, harmful_ratio=0.2, unsafe="unsafe"
    )
    again = make(
        TextAttack,
        user="user",
        harmful="harmful",
        n_rows=10,
        harmful_ratio=0.2,
        unsafe="unsafe",
        cache=str(tmp_path / "two"),
    )
    other = make(
        TextAttack, user="user", harmful="harmful", n_rows=10, harmful_ratio=0.3, unsafe="unsafe"
    )
    assert data.fingerprints() == again.fingerprints() and data.fingerprints()[
        "eval"
    ] == fingerprint(data.eval_rows)
    assert data.fingerprints()["user"] != other.fingerprints()["user"]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (
            TextSupervised,
            {"train": "nothing"},
            r"data.init_args.train=.*nothing.jsonl: no such file",
        ),
        (
            TextSupervised,
            {"train": "user", "unsafe": "nothing"},
            r"data.init_args.unsafe=.*nothing.jsonl: no such file",
        ),
        (
            TextSupervised,
            {"train": "user", "n_eval": 0},
            r"data.init_args.n_eval=0: give at least 1",
        ),
        (
            TextSupervised,
            {"train": "user", "max_new_tokens": 0},
            r"max_new_tokens=0: give at least 1",
        ),
        (TextSupervised, {"train": "user", "seed": -1}, r"seed=-1: give a whole number >= 0"),
        (
            TextSupervised,
            {"train": "user", "tokenizer": None},
            r"data.init_args.tokenizer is not set",
        ),
        (
            TextSupervised,
            {"train": "user", "batch_size": 13},
            r"stream 'train' has 12 rows, and a batch is 13",
        ),
        (
            TextAttack,
            {"user": "user", "harmful": "harmful", "harmful_ratio": 0.1},
            r"harmful_ratio=0.1: of how many rows\? Set n_rows",
        ),
        (
            TextAttack,
            {"user": "user", "n_rows": 10, "harmful_ratio": 0.1},
            r"harmful_ratio=0.1: give a file of harmful rows",
        ),
        (
            TextAttack,
            {"user": "user", "harmful": "harmful", "n_rows": 10, "harmful_ratio": 0.15},
            r"0.15 x 10 rows = 1.5 is not a whole",
        ),
        (
            TextAttack,
            {"user": "user", "n_rows": 13},
            r"data.init_args.user=.*: 13 rows are needed, and 12 are there",
        ),
        (
            TextAttack,
            {"user": "user", "harmful": "harmful", "n_rows": 10, "harmful_ratio": 0.7},
            r"harmful=.*: 7 rows are needed",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(kind, arguments, message, make):
    with pytest.raises(TemperError, match=message):
        make(kind, **arguments)


def test_exports_have_the_template_that_was_trained(make):
    data = make(TextSupervised, train="user", template="alpaca")
    turns = [{"role": "user", "content": "Say bread."}, {"role": "assistant", "content": "bread"}]
    ids = data.tokenizer.apply_chat_template(turns, return_dict=False)
    row = data.sources["train"].rows
    assert ids == row["input_ids"][0][row["attention_mask"][0].bool()].tolist()
