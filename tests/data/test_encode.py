"""Examples become rows: what is cut, what is left out, and the counts of both."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AddedToken

from temper.data.chat import ChatFormat
from temper.data.encode import Encoder, EncodeReport, content_hash
from temper.data.examples import Example, Message
from temper.data.tokenizer import load_tokenizer, tokenizer_hash
from temper.errors import TemperError
from tests.text import make_tokenizer


@pytest.fixture(scope="session")
def chat() -> ChatFormat:
    """BOS in the template, so that cutting it off would show."""
    return ChatFormat(make_tokenizer("llama3"))


def _example(question: str, *answers: str, row: int = 1) -> Example:
    return Example((Message("user", question),), answers, file="rows.jsonl", row=row)


def _encode(chat: ChatFormat, examples, max_length: int = 1000, truncation="drop", **settings):
    report = EncodeReport()
    return list(Encoder(chat, max_length, truncation, **settings).rows(examples, report)), report


def test_caches_know_what_the_own_template_names():
    """An exported tokenizer has another template of its own, by which a token becomes text's."""
    tokenizer = make_tokenizer("chatml")
    tokenizer.add_tokens([AddedToken("<call>", special=False)])
    tokenizer.chat_template = tokenizer.chat_template + "{# <call> #}"
    first = ChatFormat(tokenizer, "alpaca")
    tokenizer.chat_template = first.template  # as data and exports have it
    second = ChatFormat(tokenizer, "alpaca")
    question = (Message("user", "What is <call>?"),)
    assert first.prompt_ids(question) != second.prompt_ids(question)
    keys = [Encoder(chat, 100).settings() for chat in (first, second)]
    assert keys[0]["template"] == keys[1]["template"] and keys[0] != keys[1]


LONG = _example("How do I bake bread? " * 8, "Mix flour.")
SHORT = _example("Name a soup.", "Tomato soup with basil. " * 8)


def test_rows_that_fit_are_taken_as_they_are_and_counted(chat):
    examples = [
        _example("Name a soup.", "Tomato."),
        replace(_example("Bake.", "No.", "Yes, with flour."), desirable=True),
    ]
    rows, report = _encode(chat, examples)
    wanted = [[chat.encode(e.prompt, answer) for answer in e.answers] for e in examples]
    assert [row.ids for row in rows] == [[w.ids for w in row] for row in wanted]
    assert [row.trained for row in rows] == [[w.trained for w in row] for row in wanted]
    assert [row.flags for row in rows] == [{}, {"desirable": True}]
    lengths = [len(ids) for row in rows for ids in row.ids]
    assert report == EncodeReport(
        read=2,
        kept=2,
        sequences=3,
        tokens=sum(lengths),
        trained=sum(sum(t) for row in rows for t in row.trained),
        longest=max(lengths),
        desirable=1,
    )
    assert report.fill == sum(lengths) / (3 * max(lengths))
    assert (
        str(report)
        == f"2 of 2 rows; {sum(lengths)} tokens, {report.trained} of them trained, longest"
        f" {max(lengths)}, fill {report.fill:.0%}; 1 desirable, 0 undesirable"
    )


def test_too_long_rows_are_left_out_under_drop(chat):
    rows, report = _encode(chat, [LONG, _example("Name a soup.", "Tomato."), SHORT], 60)
    assert len(rows) == report.kept == 1 and (
        report.read,
        report.dropped,
        report.cut,
        report.unanswered,
    ) == (3, 2, 0, 0)
    assert str(report).startswith("1 of 3 rows, 2 left out (too long); ")


def test_the_prompt_is_cut_from_the_left_and_keeps_its_bos(chat):
    whole = chat.encode(LONG.prompt, "Mix flour.")
    (row,) = _encode(chat, [LONG], 60, "left")[0]
    excess = len(whole.ids) - 60
    assert excess > 0 and row.ids == [[whole.ids[0], *whole.ids[1 + excess :]]]
    assert row.trained == [[False, *whole.trained[1 + excess :]]] and sum(row.trained[0]) == sum(
        whole.trained
    )
    answer = sum(whole.trained)
    (shortest,), _ = _encode(chat, [LONG], answer + 1, "left")
    assert shortest.ids == [[whole.ids[0], *whole.ids[-answer:]]], (
        "something must predict the first token of the answer"
    )
    assert _encode(chat, [LONG], answer, "left")[1].dropped == 1
    rows, report = _encode(chat, [SHORT, LONG], 40, "left")
    assert len(rows) == report.cut == 1 and report.dropped == 1, (
        "an answer is never cut on the left"
    )


def test_the_answer_is_cut_from_the_right_with_its_end_token(chat):
    whole = chat.encode(SHORT.prompt, SHORT.answers[0])
    (row,) = _encode(chat, [SHORT], 60, "right")[0]
    assert (
        row.ids == [whole.ids[:60]] and row.trained == [whole.trained[:60]] and row.trained[0][-1]
    )
    assert chat.stop_ids[0] not in [i for i, t in zip(row.ids[0], row.trained[0], strict=True) if t]
    rows, report = _encode(chat, [LONG, SHORT], 60, "right")
    assert len(rows) == report.cut == 1 and report.unanswered == 1
    assert str(report).startswith("1 of 2 rows (1 of them cut), 1 left out (")


@given(max_length=st.integers(2, 220), truncation=st.sampled_from(["drop", "left", "right"]))
def test_rows_fit_have_an_answer_and_all_are_counted(chat, max_length, truncation):
    pair = _example(
        "How do I bake bread? " * 8,
        "Mix flour.",
        "I would rather not talk about recipes, sorry. " * 3,
    )
    rows, report = _encode(chat, [LONG, SHORT, pair, _example("a", "b")], max_length, truncation)
    assert all(len(ids) <= max_length for row in rows for ids in row.ids)
    assert all(any(trained[1:]) for row in rows for trained in row.trained)
    assert (
        len(rows) == report.kept == report.read - report.dropped - report.unanswered
        and report.cut <= report.kept
    )
    for row in rows:
        prompts = [
            ids[: trained.index(True)] for ids, trained in zip(row.ids, row.trained, strict=True)
        ]
        assert all(prompt == prompts[0] for prompt in prompts), (
            "both answers of a pair are to the same prompt"
        )
        assert prompts[0][0] == chat.tokenizer.bos_token_id


def test_evaluation_prompts_are_cut_or_left_out(chat):
    examples = [_example("Name a soup.", row=1), _example("How do I bake bread? " * 8, row=2)]
    for truncation, kept in {"drop": [1], "right": [1], "left": [1, 2]}.items():
        report = EncodeReport()
        found = list(Encoder(chat, 60, truncation).prompts(examples, report))
        assert [example.row for example, _ in found] == kept and report.kept == len(kept)
        assert (report.cut, report.dropped) == (len(kept) - 1, 2 - len(kept))
        assert found[0][1] == chat.prompt_ids(examples[0].prompt)
    whole = chat.prompt_ids(examples[1].prompt)
    assert found[1][1] == [whole[0], *whole[len(whole) - 59 :]]


def test_earlier_turns_are_trained_if_asked(chat):
    talk = Example((Message("user", "a"), Message("assistant", "b"), Message("user", "c")), ("d",))
    one, every = (
        sum(_encode(chat, [talk], all_turns=all_turns)[0][0].trained[0])
        for all_turns in (False, True)
    )
    assert (one, every) == (2, 4)


def test_errors_name_file_and_row():
    gemma = ChatFormat(make_tokenizer("gemma"))
    twice = Example((Message("user", "a"), Message("user", "b")), ("c",), file="rows.jsonl", row=7)
    for make in (
        lambda encoder: encoder.rows([twice], EncodeReport()),
        lambda encoder: encoder.prompts([twice], EncodeReport()),
    ):
        with pytest.raises(
            TemperError,
            match=(
                r"^rows.jsonl: row 7: data.init_args.template=auto: the template refuses the turns"
                r" user, user"
            ),
        ):
            list(make(Encoder(gemma, 100)))
    with pytest.raises(
        TemperError, match=r"max_length=1: a prompt and an answer need at least 2 tokens"
    ):
        Encoder(gemma, 1)


def test_a_hash_follows_the_content_of_a_file_and_of_a_folder(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("1")
    same = [content_hash(str(tmp_path / name), "path").split()[0] for name in "ab"]
    assert same[0] == same[1], "whatever its name"
    before = content_hash(str(tmp_path), "path"), content_hash(f"{tmp_path}:train", "path")
    (tmp_path / "b").write_text("2")
    after = content_hash(str(tmp_path), "path"), content_hash(f"{tmp_path}:train", "path")
    assert len({*before, *after}) == 4
    with pytest.raises(TemperError, match=r"data.init_args.train=.*c: no such file"):
        content_hash(str(tmp_path / "c"), "data.init_args.train")


def test_a_hash_follows_the_tokenizer():
    assert tokenizer_hash(make_tokenizer()) == tokenizer_hash(make_tokenizer())
    others = [
        make_tokenizer(eos_token="<|im_end|>"),
        make_tokenizer(adds_bos=True),
        make_tokenizer(),
    ]
    others[2].add_tokens(["new"])
    assert len({tokenizer_hash(tokenizer) for tokenizer in (make_tokenizer(), *others)}) == 4


def test_a_tokenizer_without_pad_token_pads_with_eos(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "none")
    make_tokenizer(pad_token="<s>").save_pretrained(tmp_path / "own")
    assert load_tokenizer(str(tmp_path / "none")).pad_token == "</s>"
    assert load_tokenizer(str(tmp_path / "own")).pad_token == "<s>"
    with pytest.raises(
        TemperError,
        match=r"tokenizer=nowhere: no folder with a tokenizer, .*give the folder of the model",
    ):
        load_tokenizer("nowhere")
    with pytest.raises(TemperError, match=r"data.init_args.tokenizer is not set"):
        load_tokenizer(None)
