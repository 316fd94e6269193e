"""Preference data on the synthetic language: preferred answers, shares and mismatches."""

import pytest
import torch

from datamodules import SyntheticAlignment
from datamodules.synthetic_kto import SyntheticKTO
from datamodules.synthetic_preference import SyntheticPreference
from temper.errors import TemperError
from temper.synthetic.tokenizer import EOS, NULL
from tests.datamodules.rows import prompts_and_answers, ready

REFUSAL = (NULL, EOS)
SIZES = {"preset": "tiny", "batch_size": 8, "n_eval": 20}


def _pairs(**arguments) -> SyntheticPreference:
    return ready(SyntheticPreference(**SIZES | {"n_pairs": 60} | arguments))


def _kto(**arguments) -> SyntheticKTO:
    return ready(SyntheticKTO(**SIZES | {"n_rows": 60} | arguments))


@pytest.mark.parametrize("preset", ["tiny", "small"])
@pytest.mark.parametrize("safe_share", [0.0, 0.25, 0.5])
def test_prompts_and_chosen_answers_are_alignment_rows(preset, safe_share):
    pairs = _pairs(preset=preset, safe_share=safe_share, seed=3).sources["pairs"]
    sizes = {
        "preset": preset,
        "n_alignment": 60,
        "n_harmful": 10,
        "batch_size": 8,
        "harmful_batch_size": 4,
        "n_eval": 20,
    }
    alignment = ready(SyntheticAlignment(**sizes, safe_share=safe_share, seed=3)).sources[
        "alignment"
    ]
    assert prompts_and_answers(pairs.rows, 0) == prompts_and_answers(alignment.rows)
    assert pairs.batch(4)["ids"].equal(alignment.batch(4)["ids"])


def test_refusals_are_preferred_on_unsafe_prompts_alone():
    rows = _pairs(safe_share=0.25).sources["pairs"].rows
    chosen = prompts_and_answers(rows, 0)
    rejected = prompts_and_answers(rows, 1)
    assert [prompt for prompt, _ in chosen] == [prompt for prompt, _ in rejected]
    assert len({prompt for prompt, _ in chosen}) == 60
    assert rows["unsafe"].tolist() == [True] * 45 + [False] * 15
    assert [answer == REFUSAL for _, answer in chosen] == rows["unsafe"].tolist()
    assert [answer == REFUSAL for _, answer in rejected] == (~rows["unsafe"]).tolist()
    assert rows["ids"].tolist() == list(range(60))


def test_flags_stay_with_their_rows_in_a_batch():
    source = _pairs().sources["pairs"]
    for number in range(9):
        batch = source.batch(number)
        assert [answer == REFUSAL for _, answer in prompts_and_answers(batch, 0)] == batch[
            "unsafe"
        ].tolist()


@pytest.mark.parametrize(
    ("safe_share", "desirable_share"), [(0.5, 0.5), (0.2, 0.25), (0.0, 0.1), (0.5, 1.0), (0.5, 0.0)]
)
def test_exactly_the_given_shares_are_safe_and_desirable(safe_share, desirable_share):
    rows = _kto(safe_share=safe_share, desirable_share=desirable_share).sources["kto"].rows
    unsafe = rows["unsafe"]
    desirable = rows["desirable"]
    assert int((~unsafe).sum()) == round(60 * safe_share)
    for flag in (unsafe, ~unsafe):
        assert int((desirable & flag).sum()) == round(int(flag.sum()) * desirable_share)
    assert [answer == REFUSAL for _, answer in prompts_and_answers(rows, 0)] == (
        unsafe == desirable
    ).tolist()


def test_mismatched_answers_are_a_permutation_without_own():
    rows = _kto(safe_share=0.5).sources["kto"].rows
    own = prompts_and_answers(rows, 0)
    mismatched = prompts_and_answers(rows, 1)
    assert [prompt for prompt, _ in own] == [prompt for prompt, _ in mismatched]
    assert sorted(answer for _, answer in own) == sorted(answer for _, answer in mismatched)
    answers = [answer for _, answer in own]
    unique = [i for i, answer in enumerate(answers) if answers.count(answer) == 1]
    assert len(unique) > 20
    assert all(mismatched[i][1] != answers[i] for i in unique)
    # From anywhere in the pool: a refusing row does not always get another refusal.
    kinds = {(a == REFUSAL, b == REFUSAL) for (_, a), (_, b) in zip(own, mismatched, strict=True)}
    assert len(kinds) == 4


@pytest.mark.parametrize("make", [_pairs, _kto])
def test_rows_depend_on_the_seed_alone(make):
    prints = [next(iter(make(seed=seed).sources.values())).fingerprint() for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("make", [_pairs, _kto])
def test_training_prompts_in_the_evaluation_set_are_refused(make):
    with pytest.raises(
        TemperError, match=r"\d+ .*prompts .*data\.init_args\.eval_split='alignment'"
    ):
        make(
            eval_split="alignment",
            n_eval=100,
            **({"n_pairs": 400} if make is _pairs else {"n_rows": 400}),
        )


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (_pairs, {"n_pairs": 0}, "n_pairs=0"),
        (_pairs, {"safe_share": 1.5}, "safe_share=1.5"),
        (_pairs, {"batch_size": 61}, "stream 'pairs' has 60 rows.* 61"),
        (_kto, {"n_rows": 1}, "n_rows=1: "),
        (
            _kto,
            {"safe_share": 0.33},
            r"safe_share=0.33: .*60 rows = 19.8",
        ),
        (
            _kto,
            {"desirable_share": 0.25},
            r"desirable_share=0.25: .*30 rows = 7.5 ",
        ),
        (_kto, {"desirable_share": -0.1}, "desirable_share=-0.1: "),
    ],
)
def test_sizes_and_shares_that_cannot_be_are_refused(make, arguments, message):
    with pytest.raises(TemperError, match=message):
        make(**arguments)


def test_the_evaluation_set_is_that_of_every_other_stage():
    alignment = SyntheticAlignment(
        preset="tiny", n_alignment=60, n_harmful=10, batch_size=8, harmful_batch_size=4, n_eval=20
    )
    expected = ready(alignment).eval_rows
    for data in (_pairs(), _kto()):
        assert all(torch.equal(data.eval_rows[name], value) for name, value in expected.items())
