"""Data from a user's files: what their streams hold and what is refused."""

import pytest

from datamodules import (
    TextAlignment,
    TextAttack,
    TextKTO,
    TextPreference,
    TextSupervised,
    TextUnlearning,
)
from temper.data import fingerprint, sequence
from temper.errors import TemperError
from tests.datamodules.text_rows import (
    ASKED,
    KEYS,
    REFUSAL,
    REFUSED,
    SAID,
    row_texts,
    stream_texts,
)
from tests.text import make_tokenizer, write_lines


def test_supervised_rows_are_those_of_the_file(make):
    data = make(TextSupervised, train="user", stream="alignment")
    assert list(data.sources) == ["alignment"] and stream_texts(data, "alignment") == SAID
    assert (
        data.sources["alignment"].batches_per_pass == 6
        and set(data.sources["alignment"].batch(0)) == KEYS
    )


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
    assert (
        stream_texts(data, "alignment") == REFUSED[:8]
        and stream_texts(data, "harmful") == ASKED[:6]
    )
    assert (
        stream_texts(data, "harmful_pairs", 0) == ASKED[:8]
        and stream_texts(data, "harmful_pairs", 1) == REFUSED[:8]
    )
    assert stream_texts(data, "heldout_pairs", 0) == SAID[:4]
    assert (
        stream_texts(data, "harmful_heldout")
        == stream_texts(data, "heldout_pairs", 1)
        == [(question, REFUSAL) for question, _ in SAID[:4]]
    )
    assert [source.batch_size for source in data.sources.values()] == [2, 3, 3, 2, 2]
    assert all(set(source.batch(0)) == KEYS for source in data.sources.values())
    assert list(make(TextAlignment, alignment="alignment").sources) == ["alignment"]


def test_an_attack_has_an_exact_nested_share_of_harmful_rows(make):
    drawn = {}
    for ratio in (0.0, 0.2, 0.5):
        rows = stream_texts(
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
    assert set(stream_texts(other, "user")) != drawn[0.5]


def test_an_attack_may_use_the_whole_file_and_defence_rows(make):
    data = make(TextAttack, user="user", alignment="alignment", alignment_batch_size=4)
    assert (
        sorted(stream_texts(data, "user")) == sorted(SAID)
        and stream_texts(data, "alignment") == REFUSED[:8]
    )
    assert data.sources["alignment"].batch_size == 4


def test_preference_pairs_put_the_chosen_answer_first(make):
    data = make(TextPreference, pairs="pairs")
    assert (
        stream_texts(data, "pairs", 0) == REFUSED[:8]
        and stream_texts(data, "pairs", 1) == ASKED[:8]
    )
    assert set(data.sources["pairs"].batch(0)) == KEYS
    data = make(TextPreference, pairs="pairs", safe_pairs="safe_pairs")
    assert stream_texts(data, "pairs", 0) == [*REFUSED[:8], *SAID[:4]]


def test_kto_rows_have_their_mark_and_the_answer_of_another_row(make):
    data = make(TextKTO, train="kto")
    own = stream_texts(data, "kto", 0)
    other = stream_texts(data, "kto", 1)
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
        stream_texts(data, "forget", 0) == ASKED[:8]
        and stream_texts(data, "forget", 1) == REFUSED[:8]
        and stream_texts(data, "retain") == SAID[:8]
    )
    measured = {name: row_texts(data, rows) for name, rows in data.unlearning_rows().items()}
    assert measured == {"forget": ASKED[:3], "holdout": ASKED[8:11], "retain": SAID[:3]}
    data = make(TextUnlearning, forget="forget_alone")
    assert list(data.sources) == ["forget"] and stream_texts(data, "forget") == ASKED[:8]
    with pytest.raises(
        TemperError,
        match=r"data.init_args.holdout is not set, and UnlearningEvaluation measures on it",
    ):
        data.unlearning_rows()


def test_measured_rows_have_tofus_answers_and_training_has_not(make, folder, capsys):
    rows = [
        {
            "question": question,
            "answer": answer,
            "paraphrased_question": "Not read?",
            "paraphrased_answer": f"One cooks it: {answer}",
            "perturbed_answer": ["Boil it.", "Fry it in butter.", "Bake it."][: 3 - i % 2],
        }
        for i, (question, answer) in enumerate(ASKED[:4])
    ]
    del rows[2]["paraphrased_answer"]
    rows[3]["perturbed_answer"] = None
    write_lines(folder / "tofu.jsonl", rows)
    files = {"forget": "tofu", "retain": "tofu", "holdout": "holdout"}
    data = make(TextUnlearning, **files, n_measured=4, retain_batch_size=2)
    assert stream_texts(data, "forget") == ASKED[:4] == stream_texts(data, "retain")
    assert "not read: 'paraphrased_question'" in str(data.reports["forget"])
    measured = data.unlearning_rows()
    assert row_texts(data, measured["holdout"]) == ASKED[8:]  # as they are trained
    assert "paraphrased" not in measured["holdout"]
    for name in ("forget", "retain"):
        found = measured[name]
        assert found["paraphrased"].tolist() == [True, True, False, True]
        assert row_texts(data, sequence(found, 0)) == ASKED[:4]
        said = [
            [
                answer
                for _, answer in row_texts(data, {k: v[i] for k, v in found.items() if v.ndim > 1})
            ]
            for i in range(4)
        ]
        present = (found["labels"] != -100).any(-1)
        assert [
            [answer for answer, there in zip(row, kept, strict=True) if there]
            for row, kept in zip(said, present.tolist(), strict=True)
        ] == [
            [row["answer"]]
            + ([row["paraphrased_answer"]] if "paraphrased_answer" in row else [])
            + (row["perturbed_answer"] or [])
            for row in rows
        ]


def test_retain_rows_have_substitutes_on_demand(make):
    given = {"forget": "forget", "retain": "forget", "retain_batch_size": 2}
    assert make(TextUnlearning, **given).sources["retain"].rows["input_ids"].ndim == 2
    data = make(TextUnlearning, **given, retain_substitutes=True)
    assert stream_texts(data, "retain", 0) == ASKED[:8]
    assert stream_texts(data, "retain", 1) == REFUSED[:8]


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


# -- fingerprints, refusals, exports


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
def test_invalid_text_data_settings_are_refused(kind, arguments, message, make):
    with pytest.raises(TemperError, match=message):
        make(kind, **arguments)


def test_exports_have_the_template_that_was_trained(make):
    data = make(TextSupervised, train="user", template="alpaca")
    turns = [{"role": "user", "content": "Say bread."}, {"role": "assistant", "content": "bread"}]
    ids = data.tokenizer.apply_chat_template(turns, return_dict=False)
    row = data.sources["train"].rows
    assert ids == row["input_ids"][0][row["attention_mask"][0].bool()].tolist()
