"""Evaluation prompts of a user's files, and their overlap with the training rows."""

import json
import logging
import shutil
import warnings
from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from datamodules import (
    GSM8K,
    SST2,
    TextSupervised,
    TextUnlearning,
)
from datamodules.text_evaluation import in_first_half
from temper.errors import TemperError
from temper.judges import KeywordRefusal
from tests.datamodules.text_rows import (
    ASKED,
    DISHES,
)
from tests.text import write_lines


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


def test_an_end_of_turn_not_flagged_special_is_no_answer(make, folder, tmp_path):
    stored = shutil.copytree(folder / "tokenizer", tmp_path / "unflagged")
    content = json.loads((stored / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] &= token["content"] not in ("<end_of_turn>", "<|im_end|>")
    (stored / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((stored / "tokenizer_config.json").read_text())
    settings["extra_special_tokens"] = []
    settings.pop("additional_special_tokens", None)
    (stored / "tokenizer_config.json").write_text(json.dumps(settings))
    data = make(TextSupervised, train="user", task="task", tokenizer=str(stored))
    ends = data.tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<|im_end|>"])
    assert not set(ends) & set(data.tokenizer.all_special_ids), "not flagged"
    texts = [" 5<end_of_turn>\nuser\nAnd 6?", "4 eggs</s> more", "7<|im_end|>8"]
    ids = data.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    answers = data.answer_texts(ids["input_ids"])
    assert answers[:2] == ["5", "4 eggs"] and answers[2] != "7", "an end token of the network alone"
    network = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=[ends[1], 20]))
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(network=network))
    assert data.answer_texts(ids["input_ids"]) == ["5", "4 eggs", "7"]
    assert data.end_tokens() == [*data.stop_ids, ends[1], 20]


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
        data.format.name == "booster"
        and len(data.sources["user"].pool) == 2
        and data.eval_kinds == ["task"]
    )
    text = data.tokenizer.decode(data.sources["user"].rows["input_ids"][0])
    assert "### Instruction:\n" in text and ("### Input:\na " in text) is (kind is SST2)
    prompt = data.format.prompt_ids(data.eval_examples[0].prompt)
    assert data.tokenizer.decode(prompt).endswith("\n\n### Response:\n")
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
        match="no evaluation prompts; give a file of unsafe, safe or task prompts",
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


def test_half_of_the_prompts_may_find_the_refusal_direction(make):
    data = make(TextSupervised, train="user", unsafe="unsafe", safe="safe", n_eval=2)
    found = data.direction_prompts()
    asked = data.prompt_texts(data.eval_rows)
    for number, kind in enumerate(("unsafe", "safe")):
        of_kind = [i for i, k in enumerate(data.eval_rows["kind"].tolist()) if k == number]
        assert found[kind]["ids"].tolist() == [i for i in of_kind if in_first_half(asked[i])]
        for name in ("input_ids", "attention_mask"):
            assert found[kind][name].equal(data.eval_rows[name][found[kind]["ids"]])


def test_a_direction_needs_unsafe_and_safe_prompts(make):
    data = make(TextSupervised, train="user", unsafe="unsafe", n_eval=2)
    with pytest.raises(TemperError, match=r"give data\.init_args\.safe"):
        data.direction_prompts()
