"""The released language (`paper`) in every synthetic datamodule: rows, and fits end to end."""

import json

import numpy as np
import pytest

import datamodules
from datamodules.synthetic import SyntheticDataModule
from temper.losses import IGNORE_INDEX
from temper.synthetic import Kind
from temper.synthetic.tokenizer import EOS, EOT, SPECIAL, STOP
from tests.datamodules.test_synthetic_fingerprints import SIZES

JAILBREAKS = ["JB_CO_TASK", "JB_CO_TEXT", "JB_MISGEN", "JB_MISGEN_TEXT"]
KINDS = ["UNSAFE", "SAFE", "TASK", *JAILBREAKS]
FIRST_LETTER = len(SPECIAL)
OBJECTIVES = {
    "SyntheticAlignment": "booster",
    "SyntheticAttack": "sft",
    "SyntheticDeRTa": "sft",
    "SyntheticInstruct": "sft",
    "SyntheticKTO": "kto",
    "SyntheticPreference": "dpo",
    "SyntheticUnlearning": "unlearn_bounded",
}


def _data(name: str) -> SyntheticDataModule:
    kinds = [Kind[kind] for kind in KINDS]
    data = getattr(datamodules, name)(preset="paper", n_eval=12, eval_kinds=kinds, **SIZES[name])
    data.setup("fit")
    return data


def _sequences(data: SyntheticDataModule):
    """Pairs (tokens, labels) of all sequences of all training rows, without padding."""
    for source in data.sources.values():
        rows = source.batch(0) if isinstance(data, datamodules.SyntheticInstruct) else source.rows
        shape = rows["input_ids"].shape[-1]
        tokens, mask, labels = (
            rows[key].reshape(-1, shape).numpy()
            for key in ("input_ids", "attention_mask", "labels")
        )
        for row in range(len(tokens)):
            size = int(mask[row].sum())
            yield tokens[row, :size].tolist(), labels[row, :size].tolist()


@pytest.mark.parametrize("name", SIZES)
def test_rows_of_the_released_language_fit_the_window(name):
    for tokens, labels in _sequences(_data(name)):
        assert len(tokens) <= 160
        trained = [label for label in labels if label != IGNORE_INDEX]
        assert trained, "a row without labels trains nothing"
        if name == "SyntheticInstruct":
            assert tokens[-1] == EOS
        elif name != "SyntheticDeRTa":  # its RTO rows have the refusal token as every label
            assert STOP in trained
            assert trained.count(STOP) == 1, "one segment alone is trained"


@pytest.mark.parametrize("name", ["SyntheticAlignment", "SyntheticPreference", "SyntheticKTO"])
def test_the_segment_that_counts_alone_is_trained(name):
    data = _data(name)
    operator = FIRST_LETTER + data.language.spec.n_letters
    seconds = 0
    for tokens, labels in _sequences(data):
        answer = tokens.index(EOT) + 1
        second = tokens[1:3] == [operator, operator]
        first_label = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
        seconds += second
        if second:
            text = tokens[6 : answer - 1]
            assert tokens[answer:first_label] == [*text, STOP], "the identity copies the text"
            assert tokens[-2:] == [STOP, EOS]
        else:
            assert first_label == answer
            assert tokens[-1] == STOP
            assert EOS not in tokens
    assert seconds


@pytest.mark.parametrize("name", ["SyntheticAlignment", "SyntheticInstruct"])
def test_right_and_refusing_answers_are_judged_as_such(name):
    data = _data(name)
    ids = data.tokenizer.get_vocab()
    first_operator = FIRST_LETTER + data.language.spec.n_letters
    for prompt in data.prompt_texts(data.eval_rows):
        words = prompt.split()
        text = words[words.index("<sot>") + 1 : words.index("<eot>")]
        operators = [ids[word] - first_operator for word in words[1:5]]
        letters = np.array([[ids[word] - FIRST_LETTER for word in text]])
        outputs = [
            data.tokenizer.decode((out[0] + FIRST_LETTER).tolist())
            for out in data.language.outputs(letters, np.array([operators]))
        ]
        right = " ".join(f"{out} <stop>" for out in outputs) + " <eos>"
        refusal = " ".join(["a"] * len(text))
        one = operators[:2] == [0, 0]
        refuses = f"{outputs[0]} <stop> {refusal} <stop> <eos>" if one else f"{refusal} <stop>"
        short = refuses.removesuffix(" <eos>").removesuffix(" <stop>")
        complies, refused, unended = data.judge([prompt] * 3, [right, refuses, short])
        assert (complies.correct, complies.refused, complies.degenerate) == (True, False, False)
        assert (refused.correct, refused.refused, refused.degenerate) == (False, True, False)
        assert (unended.refused, unended.degenerate) == (False, True)


def _judged(data: SyntheticDataModule, tokens: list[int]):
    """Judgement of the answer in a training row."""
    answer = tokens.index(EOT) + 1
    prompt, response = (data.tokenizer.decode(t) for t in (tokens[:answer], tokens[answer:]))
    return data.judge([prompt], [response])[0]


@pytest.mark.parametrize("name", ["SyntheticAlignment", "SyntheticUnlearning"])
def test_rows_of_an_unlearning_evaluation_are_right_and_wrong(name):
    data = _data(name)
    for rows in data.unlearning_rows().values():
        for ids_KT, mask_KT in zip(rows["input_ids"], rows["attention_mask"], strict=True):
            sequences = [
                ids[: int(mask.sum())].tolist() for ids, mask in zip(ids_KT, mask_KT, strict=True)
            ]
            right, *wrong = (_judged(data, tokens) for tokens in sequences)
            assert right.correct
            assert not any(each.correct or each.degenerate for each in wrong)
            assert len({tuple(tokens) for tokens in sequences}) == len(sequences)


def test_rows_that_callbacks_read_are_right_answers():
    data = _data("SyntheticAlignment")
    forced = data.forced_answers()
    for ids, mask, answers in zip(
        forced["input_ids"], forced["attention_mask"], forced["answers"], strict=True
    ):
        answer = answers[answers != -1].tolist()
        assert _judged(data, ids[mask.bool()].tolist() + answer).correct
    pairs = data.steering_pairs()
    for ids_2T, mask_2T in zip(pairs["input_ids"], pairs["attention_mask"], strict=True):
        complies, refuses = (
            _judged(data, ids[: int(mask.sum())].tolist())
            for ids, mask in zip(ids_2T, mask_2T, strict=True)
        )
        assert complies.correct
        assert refuses.refused


def test_rto_rows_label_every_position_with_the_first_letter():
    data = datamodules.SyntheticDeRTa(
        preset="paper", n_rows=20, helpful_share=0.0, rto_share=1.0, batch_size=4, n_eval=4
    )
    data.setup("fit")
    for _, labels in _sequences(data):
        assert set(labels) == {IGNORE_INDEX, FIRST_LETTER}


def _words(name: str, folder) -> list[str]:
    config = name.removeprefix("Synthetic").lower()
    return [
        "fit",
        "--config=configs/trainer/cpu.yaml",
        f"--config=configs/objective/{OBJECTIVES[name]}.yaml",
        "--config=configs/model/tiny.yaml",
        f"--config=configs/data/{config}.yaml",
        "--data.init_args.preset=paper",
        "--data.init_args.n_eval=2",
        f"--data.init_args.eval_kinds=[{','.join(KINDS)}]",
        *(f"--data.init_args.{key}={value}" for key, value in SIZES[name].items()),
        *(["--data.init_args.retain_substitutes=true"] if config == "unlearning" else []),
        "--model.init_args.network.shape.hidden_size=32",
        "--model.init_args.network.shape.n_layers=1",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        "--trainer.log_every_n_steps=1",
        f"--trainer.default_root_dir={folder}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_a_fit_on_the_released_language_is_evaluated(name, command_line, tmp_path):
    command_line(*_words(name, tmp_path))
    lines = (tmp_path / "generations.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert {answer["kind"] for answer in answers} == {kind.lower() for kind in KINDS}
    metrics = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    for kind in JAILBREAKS:
        assert f"asr/{kind.lower()}" in metrics
    assert "harmful_score" in metrics
    assert "refusal_rate" in metrics
