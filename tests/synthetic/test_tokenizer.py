"""Token ids of prompts and responses, and the tokenizer that writes them as text."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from temper.synthetic import PRESETS, Kind, Language, build_tokenizer, language_spec
from temper.synthetic.prompts import draw_batch
from temper.synthetic.tokenizer import (
    BOS,
    EOS,
    EOT,
    NULL,
    PAD_ID,
    SOT,
    SPECIAL,
    STOP,
    compliance_tokens,
    join_padded,
    prompt_tokens,
    refusal_tokens,
    vocabulary,
)


def _drawn(language: Language, kind: Kind = Kind.INSTRUCT):
    return draw_batch(language, kind, 60, "instruct", np.random.default_rng(3))


def _unpadded(rows: np.ndarray) -> list[list[int]]:
    trimmed = []
    for row in rows.tolist():
        size = sum(token != -1 for token in row)
        assert -1 not in row[:size], "padding stands on the right"
        trimmed.append(row[:size])
    return trimmed


def test_special_tokens_have_their_places():
    assert (PAD_ID, BOS, EOS, SOT, EOT, STOP, NULL) == (0, 1, 2, 3, 4, 5, 6)
    assert SPECIAL == ("<pad>", "<bos>", "<eos>", "<sot>", "<eot>", "<stop>", "<null>")


def test_a_prompt_is_bos_operators_sot_text_eot(language):
    prompts = _drawn(language)
    first_letter = len(SPECIAL)
    first_operator = len(SPECIAL) + language.spec.n_letters
    rows = _unpadded(prompt_tokens(language, prompts))
    for row, operators, text in zip(
        rows, prompts.operators_BO, prompts.texts.letters_BT, strict=True
    ):
        letters = [int(letter) + first_letter for letter in text if letter != -1]
        assert row == [BOS, *(int(o) + first_operator for o in operators), SOT, *letters, EOT]


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind != Kind.JB_MISGEN_TEXT])
def test_compliance_is_every_output_with_a_stop_and_then_eos(simple, kind, carry_out):
    language = simple
    prompts = _drawn(language, kind)
    rows = _unpadded(compliance_tokens(language, prompts))
    for row, operators, text in zip(
        rows, prompts.operators_BO, prompts.texts.letters_BT, strict=True
    ):
        wanted = [
            token
            for out in carry_out(language, operators, text)
            for token in [*(letter + len(SPECIAL) for letter in out), STOP]
        ]
        assert row == [*wanted, EOS]


def test_a_refusal_is_null_and_eos(tiny):
    assert refusal_tokens(tiny, _drawn(tiny)).tolist() == [[NULL, EOS]] * 60


@pytest.mark.parametrize("preset", PRESETS)
def test_prompts_and_responses_are_as_long_as_the_spec_says(preset):
    language = Language(language_spec(preset))
    prompts = draw_batch(language, Kind.INSTRUCT, 200, "instruct", np.random.default_rng(3))
    assert prompt_tokens(language, prompts).shape[1] == language.spec.prompt_length
    assert compliance_tokens(language, prompts).shape[1] == language.spec.response_length


def test_join_padded_moves_padding_right_and_trims_it():
    columns = [np.array([[1, -1], [2, 3]]), np.array([[4, -1, -1], [-1, 5, -1]])]
    assert join_padded(columns).tolist() == [[1, 4, -1], [2, 3, 5]]


@pytest.mark.parametrize("n_letters", [8, 60])
def test_the_vocabulary_names_every_token_once_in_id_order(n_letters):
    spec = language_spec("tiny", n_letters=n_letters)
    tokens = vocabulary(spec)
    assert len(tokens) == len(set(tokens)) == len(SPECIAL) + spec.n_letters + spec.n_operators
    assert build_tokenizer(spec).get_vocab() == {
        token: number for number, token in enumerate(tokens)
    }


def test_decoding_reads_as_symbols():
    spec = language_spec("tiny")
    operator = len(SPECIAL) + spec.n_letters
    ids = [
        BOS,
        operator + 3,
        operator,
        SOT,
        7,
        8,
        9,
        EOT,
        operator + 6,
        operator + 9,
        NULL,
        STOP,
        EOS,
    ]
    text = "<bos> <op3> <op0> <sot> a b c <eot> <dup0> <task1> <null> <stop> <eos>"
    tokenizer = build_tokenizer(spec)
    assert tokenizer.decode(ids) == text
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == [
        "<op3>",
        "<op0>",
        "a",
        "b",
        "c",
        "<dup0>",
        "<task1>",
    ]


def test_the_tokenizer_survives_saving_and_loading(language, tmp_path):
    tokenizer = build_tokenizer(language.spec)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (PAD_ID, BOS, EOS)
    assert loaded.padding_side == "left"
    for row in _unpadded(prompt_tokens(language, _drawn(language))):
        text = tokenizer.decode(row)
        assert loaded.decode(row) == text
        assert loaded(text)["input_ids"] == row


def test_batches_of_text_are_padded_on_the_left():
    tokenizer = build_tokenizer(language_spec("tiny"))
    batch = tokenizer(["<bos> a", "<bos> a b c"], padding=True)
    assert batch["input_ids"] == [[PAD_ID, PAD_ID, BOS, 7], [BOS, 7, 8, 9]]
    assert batch["attention_mask"] == [[0, 0, 1, 1], [1, 1, 1, 1]]
