"""Rows of an unlearning evaluation: right answers, wrong ones, and unseen prompts."""

import pytest
import torch

from datamodules import SyntheticAlignment, SyntheticAttack
from datamodules.synthetic import SyntheticDataModule
from datamodules.synthetic_unlearning import SyntheticUnlearning
from datamodules.unlearning_rows import synthetic_unlearning_rows
from temper.data import Batch, PoolSource
from temper.errors import TemperError
from temper.synthetic.prompts import prompt_keys
from temper.synthetic.tokenizer import EOS, EOT, NULL, SPECIAL, STOP
from tests.datamodules.rows import prompts_and_answers, ready

SIZES = {"n_forget": 40, "n_retain": 30, "batch_size": 8, "retain_batch_size": 8, "n_eval": 25}
Prompt = tuple[int, ...]


def _unlearning(**arguments) -> SyntheticUnlearning:
    return ready(SyntheticUnlearning(**{"preset": "tiny"} | SIZES | arguments))


def _alignment(**arguments) -> SyntheticAlignment:
    return ready(
        SyntheticAlignment(
            **{
                "preset": "tiny",
                "n_alignment": 60,
                "n_harmful": 20,
                "batch_size": 8,
                "harmful_batch_size": 4,
                "n_eval": 25,
            }
            | arguments
        )
    )


def _read(rows: Batch) -> list[tuple[Prompt, list[tuple[int, ...]]]]:
    """(prompt, answers) of every row."""
    answers = [prompts_and_answers(rows, k) for k in range(rows["input_ids"].shape[1])]
    found = []
    for row in zip(*answers, strict=True):
        prompts = {prompt for prompt, _ in row}
        assert len(prompts) == 1, "all answers of a row are answers to one prompt"
        found.append((prompts.pop(), [answer for _, answer in row]))
    return found


def _of(data: SyntheticDataModule, prompt: Prompt) -> tuple[list[int], list[int]]:
    """Operators and letters of a prompt."""
    n_operators = 2 * data.language.spec.n_pairs
    first = len(SPECIAL) + data.language.spec.n_letters
    return [token - first for token in prompt[1 : 1 + n_operators]], [
        token - len(SPECIAL) for token in prompt[2 + n_operators : -1]
    ]


def _answer(data: SyntheticDataModule, operators, letters, carry_out) -> tuple[int, ...]:
    outputs = carry_out(data.language, operators, letters)
    return (
        *(token for out in outputs for token in [*(letter + len(SPECIAL) for letter in out), STOP]),
        EOS,
    )


@pytest.mark.parametrize(
    "language",
    [{}, {"n_pairs": 2, "n_grammars": 3, "n_contextual_operators": 3}],
    ids=["one pair", "two pairs"],
)
def test_the_first_answer_is_right_and_the_others_wrong(language, carry_out):
    data = _unlearning(language=language)
    n_rows = 3 if language else 12
    sets = synthetic_unlearning_rows(data, n_rows, n_perturbed=3)
    n_base = data.language.spec.n_base_operators
    n_pairs = data.language.spec.n_pairs
    for rows in sets.values():
        assert rows["ids"].tolist() == list(range(n_rows))
        for prompt, (right, *wrong) in _read(rows):
            operators, letters = _of(data, prompt)
            assert right == _answer(data, operators, letters, carry_out)
            assert len({right, *wrong}) == 4, "wrong answers are wrong, and differ"
            if n_pairs == 1:
                possible = {
                    _answer(data, (a, b), letters, carry_out)
                    for a in range(n_base)
                    for b in range(n_base)
                }
            else:  # each of the two outputs follows from the one before it
                possible = {
                    _answer(data, (a, b, c, d), letters, carry_out)
                    for a in range(n_base)
                    for b in range(n_base)
                    for c in range(n_base)
                    for d in range(n_base)
                }
            assert set(wrong) <= possible


def test_sets_are_forget_rows_unseen_rows_and_retain_rows():
    data = _unlearning(n_eval=100)
    prompts = {
        name: [prompt for prompt, _ in _read(rows)]
        for name, rows in synthetic_unlearning_rows(data).items()
    }
    assert {name: len(found) for name, found in prompts.items()} == {
        "forget": 40,
        "holdout": 40,
        "retain": 30,
    }
    streams = {
        name: [
            tuple(ids[: ids.index(EOT) + 1])
            for ids in source.rows["input_ids"].flatten(0, -2).tolist()
        ]
        for name, source in data.sources.items()
    }
    assert set(prompts["forget"]) == set(streams["forget"]) and set(prompts["retain"]) == set(
        streams["retain"]
    )
    trained = {str(_of(data, prompt)[1]) for found in streams.values() for prompt in found}
    assert not trained & {str(_of(data, prompt)[1]) for prompt in prompts["holdout"]}, (
        "no text of the holdout is trained on"
    )
    assert len(set(prompts["holdout"])) == 40


def test_alignment_data_forget_refused_and_retain_answered_rows():
    data = _alignment()
    prompts = {
        name: {prompt for prompt, _ in _read(rows)}
        for name, rows in synthetic_unlearning_rows(data).items()
    }
    rows = data.sources["alignment"].rows
    refused = {
        tuple(i[: i.index(EOT) + 1])
        for i, labels in zip(rows["input_ids"].tolist(), rows["labels"].tolist(), strict=True)
        if NULL in labels
    }
    assert prompts["forget"] <= refused and len(prompts["forget"]) == 20
    assert not prompts["retain"] & refused and len(prompts["retain"]) == 25


def test_streams_can_be_named():
    data = _alignment(n_heldout=16)
    rows = synthetic_unlearning_rows(data, forget="heldout_pairs", retain="alignment")["forget"]
    expected = {
        tuple(ids[: ids.index(EOT) + 1])
        for ids in data.sources["harmful_heldout"].rows["input_ids"].tolist()
    }
    assert {prompt for prompt, _ in _read(rows)} == expected


def test_pairs_are_retained_where_the_first_answer_complies():
    data = _alignment()
    unsafe, safe = data.alignment_prompts(30, 30)
    pairs = [data.pairs(unsafe, comply_first=False), data.pairs(safe, comply_first=True)]
    data.sources["both"] = PoolSource(
        {name: torch.cat([pair[name] for pair in pairs]) for name in pairs[0]}, 8, 0, "both"
    )
    data.stream_prompts["both"] = [(unsafe, False), (safe, True)]
    found = synthetic_unlearning_rows(data, n_rows=100, retain="both")["retain"]
    expected = _read(
        {
            name: value[:, None] if value.ndim == 2 else value
            for name, value in data.rows([(safe, True)]).items()
        }
    )
    assert [prompt for prompt, _ in _read(found)] == [prompt for prompt, _ in expected]


def test_rows_depend_on_the_data_and_fewer_are_a_prefix():
    first = synthetic_unlearning_rows(_unlearning())
    again = synthetic_unlearning_rows(_unlearning(batch_size=4))
    for name in first:
        assert all(torch.equal(first[name][key], again[name][key]) for key in first[name]), name
    other = synthetic_unlearning_rows(_unlearning(seed=1))
    assert not torch.equal(first["forget"]["input_ids"], other["forget"]["input_ids"])
    fewer = synthetic_unlearning_rows(_unlearning(), n_rows=10)
    assert [prompt for prompt, _ in _read(fewer["forget"])] == [
        prompt for prompt, _ in _read(first["forget"])
    ][:10]


def test_building_rows_leaves_the_data_unchanged():
    data = _unlearning()
    before = data.fingerprints()
    synthetic_unlearning_rows(data)
    assert data.fingerprints() == before
    assert [len(prompt_keys(p)) for p in data.eval_prompts.values()] == [25, 25]


def test_data_without_such_streams_are_refused():
    data = ready(SyntheticAttack(preset="tiny", n_rows=20, batch_size=5, n_eval=4))
    with pytest.raises(
        TemperError,
        match=r"data=SyntheticAttack: UnlearningEvaluation .*'retain' or 'alignment' .*'user'",
    ):
        synthetic_unlearning_rows(data)
    with pytest.raises(
        TemperError,
        match=r"stream 'unsafe' .*'forget', 'retain'",
    ):
        synthetic_unlearning_rows(_unlearning(), forget="unsafe")


def test_a_stream_to_retain_that_only_refuses_is_refused():
    data = _alignment(safe_share=0, n_harmful=20)
    with pytest.raises(
        TemperError,
        match=r"data=SyntheticAlignment: .*data\.init_args\.safe_share",
    ):
        synthetic_unlearning_rows(data)


def test_too_many_wrong_answers_are_refused():
    with pytest.raises(
        TemperError,
        match=r"fewer than 60 .*n_perturbed",
    ):
        synthetic_unlearning_rows(_unlearning(), n_rows=1, n_perturbed=60)
