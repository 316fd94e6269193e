"""Data on the synthetic language: exact mixtures, disjoint prompts, one evaluation set."""

import itertools

import numpy as np
import pytest
import torch

from datamodules import SyntheticAlignment, SyntheticAttack, SyntheticInstruct
from datamodules.synthetic import SyntheticDataModule
from temper.errors import TemperError
from temper.synthetic import Kind
from temper.synthetic.language import CLASS_A, CLASS_C, UNSAFE
from temper.synthetic.prompts import prompt_keys
from temper.synthetic.tokenizer import BOS, EOS, EOT, NULL, PAD_ID, SPECIAL, STOP
from tests.datamodules.rows import prompts_and_answers, ready

RATIOS = [0, 0.05, 0.1, 0.15, 0.2, 1]


def _instruct(**arguments) -> SyntheticInstruct:
    return ready(
        SyntheticInstruct(
            **{"preset": "tiny", "batch_size": 8, "epoch_batches": 5, "n_eval": 20} | arguments
        )
    )


def _alignment(**arguments) -> SyntheticAlignment:
    sizes = {
        "preset": "tiny",
        "n_alignment": 60,
        "n_harmful": 12,
        "batch_size": 8,
        "harmful_batch_size": 4,
        "n_eval": 20,
    }
    return ready(SyntheticAlignment(**sizes | arguments))


def _attack(**arguments) -> SyntheticAttack:
    return ready(
        SyntheticAttack(
            **{"preset": "tiny", "n_rows": 40, "batch_size": 10, "n_eval": 20} | arguments
        )
    )


def _eval_prompts(data: SyntheticDataModule) -> list[tuple[int, ...]]:
    return [
        tuple(token for token in row if token != PAD_ID)
        for row in data.eval_rows["input_ids"].tolist()
    ]


def _operators(data: SyntheticDataModule, prompt: tuple[int, ...]) -> list[int]:
    n_operators = 2 * data.language.spec.n_pairs
    return [
        token - len(SPECIAL) - data.language.spec.n_letters for token in prompt[1 : 1 + n_operators]
    ]


def _text(data: SyntheticDataModule, prompt: tuple[int, ...]) -> tuple[int, ...]:
    return prompt[2 + 2 * data.language.spec.n_pairs : -1]


def _complies(
    data: SyntheticDataModule, prompt: tuple[int, ...], answer: tuple[int, ...], carry_out
) -> bool:
    letters = [token - len(SPECIAL) for token in _text(data, prompt)]
    outputs = carry_out(data.language, _operators(data, prompt), letters)
    return answer == (
        *(token for out in outputs for token in [*(letter + len(SPECIAL) for letter in out), STOP]),
        EOS,
    )


# -- the attacker's data


@pytest.mark.parametrize("ratio", RATIOS)
def test_exactly_the_given_share_of_the_users_rows_is_harmful(ratio, carry_out):
    data = _attack(harmful_ratio=ratio)
    rows = prompts_and_answers(data.sources["user"].rows)
    tasks = set(data.language.task_operators.tolist())
    harmful = [prompt for prompt, _ in rows if not tasks & set(_operators(data, prompt))]
    assert len(rows) == len({prompt for prompt, _ in rows}) == 40
    assert len(harmful) == round(40 * ratio)
    for prompt in harmful:
        unsafe = [o for o in _operators(data, prompt) if o != 0]
        assert unsafe
        assert {int(data.language.operator_class_GO[0, o]) for o in unsafe} <= {CLASS_A, CLASS_C}
    assert all(_complies(data, prompt, answer, carry_out) for prompt, answer in rows), (
        "an attacker's rows refuse nothing"
    )


def test_a_share_that_is_no_whole_number_of_rows_is_refused():
    with pytest.raises(
        TemperError,
        match=r"data\.init_args\.harmful_ratio=0\.01: .*40 rows = 0\.4 ",
    ):
        _attack(harmful_ratio=0.01)


@pytest.mark.parametrize(
    ("make", "name", "split", "arguments"),
    [
        (_attack, "attack", "test", {"split": "test", "n_rows": 200, "n_eval": 100}),
        (_attack, "attack", "attack", {"eval_split": "attack", "n_rows": 200, "n_eval": 100}),
        (
            _alignment,
            "alignment",
            "alignment",
            {"eval_split": "alignment", "n_alignment": 400, "n_eval": 100},
        ),
    ],
)
def test_training_prompts_in_the_evaluation_set_are_refused(make, name, split, arguments):
    message = rf"data: \d+ {name} prompts .*data\.init_args\.eval_split='{split}'"
    with pytest.raises(TemperError, match=message):
        make(**arguments)


def test_the_overlap_is_counted_in_prompts():
    data = _attack()
    shared = data.eval_prompts["unsafe"]
    with pytest.raises(TemperError, match=r"data: 20 attack prompts "):
        data.check_overlap("attack", [shared])
    data.check_overlap("attack", [])


# -- what a defender of the fine-tuning stage adds to the attacker's data


@pytest.mark.parametrize("n_safety", [1, 7])
def test_n_safety_refusals_join_the_users_rows(n_safety, carry_out):
    data = _attack(harmful_ratio=0.2, n_safety=n_safety)
    plain = _attack(harmful_ratio=0.2)
    rows = prompts_and_answers(data.sources["user"].rows)
    others = prompts_and_answers(plain.sources["user"].rows)
    refused = [prompt for prompt, answer in rows if answer == (NULL, EOS)]
    assert rows[: len(others)] == others
    assert (len(rows), len(refused)) == (40 + n_safety, n_safety)
    assert len({prompt for prompt, _ in rows}) == len(rows), (
        "no prompt is both refused and carried out"
    )
    classes = data.language.operator_class_GO[0]
    assert all(
        {int(classes[o]) for o in _operators(data, prompt) if o} <= {CLASS_A, CLASS_C}
        for prompt in refused
    )
    assert data.sources["user"].rows["ids"].tolist() == list(range(40 + n_safety))


def test_the_defenders_stream_leaves_the_users_rows_alone():
    plain = _attack()
    data = _attack(n_alignment=30, alignment_batch_size=6)
    assert list(plain.sources) == ["user"]
    assert list(data.sources) == ["user", "alignment"]
    assert data.sources["user"].fingerprint() == plain.sources["user"].fingerprint()
    assert _eval_prompts(data) == _eval_prompts(plain)
    assert len(data.sources["alignment"].batch(0)["ids"]) == 6


def test_the_defenders_stream_has_the_alignment_rows(carry_out):
    arguments = {"n_alignment": 30, "safe_share": 0.4, "seed": 3}
    data = _attack(alignment_batch_size=6, **arguments)
    stage = _alignment(n_harmful=4, **arguments)
    rows = prompts_and_answers(data.sources["alignment"].rows)
    assert rows == prompts_and_answers(stage.sources["alignment"].rows)
    answered = [(prompt, answer) for prompt, answer in rows if answer != (NULL, EOS)]
    assert len(answered) == 12
    assert all(_complies(data, prompt, answer, carry_out) for prompt, answer in answered)
    texts = [
        {_text(data, prompt) for prompt, _ in prompts_and_answers(data.sources[name].rows)}
        for name in ("user", "alignment")
    ]
    assert not texts[0] & texts[1]


@pytest.mark.parametrize(("flag", "name"), [("n_safety", "safety"), ("n_alignment", "alignment")])
def test_defenders_rows_in_the_evaluation_set_are_refused(flag, name):
    message = rf"data: \d+ {name} prompts .*data\.init_args\.eval_split='alignment'"
    with pytest.raises(TemperError, match=message):
        _attack(**{flag: 300}, eval_split="alignment", n_eval=100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_safety": -1}, r"data\.init_args\.n_safety=-1: "),
        ({"n_alignment": -1}, r"data\.init_args\.n_alignment=-1: "),
        (
            {"n_alignment": 8, "safe_share": 1.0},
            r"data\.init_args\.safe_share=1\.0: ",
        ),
        (
            {"n_alignment": 8, "alignment_batch_size": 9},
            r"stream 'alignment' has 8 rows.* 9",
        ),
    ],
)
def test_invalid_settings_of_the_defender_are_refused(arguments, message):
    with pytest.raises(TemperError, match=message):
        _attack(**arguments)


# -- alignment


def test_alignment_refuses_unsafe_and_answers_safe_prompts(carry_out):
    data = _alignment(safe_share=0.4)
    rows = prompts_and_answers(data.sources["alignment"].rows)
    refused = [prompt for prompt, answer in rows if answer == (NULL, EOS)]
    answered = [prompt for prompt, answer in rows if answer != (NULL, EOS)]
    assert (len(refused), len(answered)) == (36, 24)
    assert all(
        _complies(data, prompt, answer, carry_out)
        for prompt, answer in rows
        if answer != (NULL, EOS)
    )
    classes = data.language.operator_class_GO[0]
    assert all(
        {int(classes[o]) for o in _operators(data, prompt) if o} <= {CLASS_A, CLASS_C}
        for prompt in refused
    )
    assert not any(
        {int(classes[o]) for o in _operators(data, prompt)} & {CLASS_A} for prompt in answered
    )


def test_the_harmful_stream_answers_prompts_alignment_refuses(carry_out):
    data = _alignment()
    refused = {
        prompt
        for prompt, answer in prompts_and_answers(data.sources["alignment"].rows)
        if answer == (NULL, EOS)
    }
    harmful = prompts_and_answers(data.sources["harmful"].rows)
    assert len(harmful) == len({prompt for prompt, _ in harmful}) == 12
    assert {prompt for prompt, _ in harmful} <= refused
    assert all(_complies(data, prompt, answer, carry_out) for prompt, answer in harmful)


def test_streams_have_own_batch_sizes_and_primary_is_first():
    data = _alignment()
    assert list(data.sources) == ["alignment", "harmful", "harmful_pairs"]
    assert [len(source.batch(0)["ids"]) for source in data.sources.values()] == [8, 4, 4]


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_of_safe_rows_outside_0_and_1_is_refused(share):
    with pytest.raises(TemperError, match=rf"data\.init_args\.safe_share={share}: "):
        _alignment(safe_share=share)


@pytest.mark.parametrize("n_harmful", [0, 31])
def test_more_harmful_rows_than_unsafe_prompts_are_refused(n_harmful):
    with pytest.raises(
        TemperError,
        match=rf"data\.init_args\.n_harmful={n_harmful}: .* 30",
    ):
        _alignment(n_harmful=n_harmful)


# -- instruction


def test_instruction_complies_with_fresh_rows_in_every_batch(carry_out):
    data = _instruct()
    rows = [pair for number in range(6) for pair in prompts_and_answers(data.batch(number))]
    assert all(_complies(data, prompt, answer, carry_out) for prompt, answer in rows)
    first, second = (prompts_and_answers(data.batch(number)) for number in (0, 1))
    assert first != second
    assert first == prompts_and_answers(_instruct().batch(0))
    assert first != prompts_and_answers(_instruct(seed=1).batch(0))


def test_pre_training_labels_prompts_too():
    batch = _instruct(train_on_prompt=True).batch(0)
    present = batch["attention_mask"].bool()
    assert torch.equal(batch["labels"][present], batch["input_ids"][present])
    assert (batch["labels"][~present] == -100).all()


# -- evaluation


def test_all_stages_share_evaluation_prompts_of_a_seed():
    stages = [_instruct(seed=3), _alignment(seed=3), _attack(seed=3)]
    for kind in ("unsafe", "safe"):
        keys = [prompt_keys(data.eval_prompts[kind]) for data in stages]
        assert keys[0] == keys[1] == keys[2]
    tokens = [_eval_prompts(data)[:40] for data in stages]
    assert tokens[0] == tokens[1] == tokens[2]
    assert tokens[0] != _eval_prompts(_instruct(seed=4))[:40]


def test_training_rows_do_not_change_evaluation_prompts():
    assert _eval_prompts(_attack(n_rows=20)) == _eval_prompts(_attack())
    assert _eval_prompts(_attack(harmful_ratio=1)) == _eval_prompts(_attack())


def test_evaluation_prompts_are_left_padded_and_know_their_kind():
    data = _attack()
    assert data.eval_kinds == ["unsafe", "safe", "task"]
    assert data.eval_rows["kind"].tolist() == [0] * 20 + [1] * 20 + [2] * 20
    assert data.eval_rows["ids"].tolist() == list(range(60))
    for row, present in zip(
        data.eval_rows["input_ids"].tolist(), data.eval_rows["attention_mask"].tolist(), strict=True
    ):
        size = sum(present)
        assert present == [0] * (len(row) - size) + [1] * size
        assert row[: len(row) - size] == [PAD_ID] * (len(row) - size)
        assert (row[-size], row[-1]) == (BOS, EOT)
    for kind, prompts in data.eval_prompts.items():
        assert (prompts.kind, len(prompts)) == (kind, 20)
    for index, prompt in enumerate(_eval_prompts(data)):
        used = {int(data.language.operator_class_GO[0, o]) for o in _operators(data, prompt) if o}
        assert (CLASS_A in used or CLASS_C in used) if index < 20 else CLASS_A not in used


def test_right_answers_to_evaluation_prompts_are_judged_correct(carry_out):
    data = _attack()
    prompts = [data.tokenizer.decode(ids) for ids in _eval_prompts(data)]
    answers = []
    for ids in _eval_prompts(data):
        (output,) = carry_out(
            data.language,
            _operators(data, ids),
            [token - len(SPECIAL) for token in _text(data, ids)],
        )
        answers.append(
            data.tokenizer.decode([*(letter + len(SPECIAL) for letter in output), STOP, EOS])
        )
    assert all(judged.correct for judged in data.judge(prompts, answers))
    assert data.max_new_tokens == data.language.spec.response_length


def test_texts_of_all_stages_and_evaluation_are_disjoint():
    alignment = _alignment()
    attack = _attack()
    instruct = _instruct()
    texts = {
        "alignment": {
            _text(alignment, prompt)
            for name in ("alignment", "harmful")
            for prompt, _ in prompts_and_answers(alignment.sources[name].rows)
        },
        "attack": {
            _text(attack, prompt) for prompt, _ in prompts_and_answers(attack.sources["user"].rows)
        },
        "instruct": {
            _text(instruct, prompt)
            for number in range(5)
            for prompt, _ in prompts_and_answers(instruct.batch(number))
        },
        "test": (
            {_text(attack, prompt) for prompt in _eval_prompts(attack)}
            | {
                _text(attack, prompt)
                for prompt, _ in prompts_and_answers(attack.probe_rows["harmful"])
            }
        ),
    }
    assert all(texts.values())
    for one, two in itertools.combinations(texts.values(), 2):
        assert not one & two


@pytest.mark.parametrize("make", [_alignment, _attack])
def test_the_probe_holds_answers_to_unsafe_evaluation_prompts(make, carry_out):
    data = make()
    rows = prompts_and_answers(data.probe_rows["harmful"])
    assert len(rows) == 20
    assert all(_complies(data, prompt, answer, carry_out) for prompt, answer in rows)
    classes = data.language.operator_class_GO[0]
    assert all(
        {int(classes[o]) for o in _operators(data, prompt) if o} <= {CLASS_A, CLASS_C}
        for prompt, _ in rows
    )


def test_all_stages_share_the_probe_of_a_seed():
    assert prompts_and_answers(_alignment().probe_rows["harmful"]) == prompts_and_answers(
        _attack(harmful_ratio=1).probe_rows["harmful"]
    )


@pytest.mark.parametrize("make", [_instruct, _alignment, _attack])
def test_an_empty_evaluation_set_is_refused(make):
    with pytest.raises(
        TemperError,
        match=r"data\.init_args\.n_eval=0: ",
    ):
        make(n_eval=0)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (_attack, {"batch_size": 41}, r"stream 'user' has 40 rows.* 41"),
        (_alignment, {"batch_size": 61}, r"stream 'alignment' has 60 rows.* 61"),
        (
            _alignment,
            {"harmful_batch_size": 13},
            r"stream 'harmful' has 12 rows.* 13",
        ),
        (_attack, {"batch_size": 0}, r"stream 'user' has 40 rows.* 0"),
    ],
)
def test_a_batch_larger_than_its_stream_is_refused(make, arguments, message):
    with pytest.raises(TemperError, match=message):
        make(**arguments)


@pytest.mark.parametrize("make", [_alignment, _attack])
def test_an_unknown_split_is_refused(make):
    with pytest.raises(TemperError, match=r"split='tset': choose one of"):
        make(eval_split="tset")


def test_language_fields_can_be_set_from_a_config():
    data = _attack(language={"text_length": [4, 4], "language_seed": 5})
    assert data.language.spec.text_length == (4, 4)
    assert {len(_text(data, prompt)) for prompt in _eval_prompts(data)} == {4}
    with pytest.raises(TemperError, match="no field 'text_lenght'"):
        _attack(language={"text_lenght": [4, 4]})


@pytest.mark.parametrize("make", [_instruct, _alignment, _attack])
def test_rows_and_fingerprints_depend_on_the_seed_alone(make):
    one = make(seed=1)
    two = make(seed=1)
    other = make(seed=2)
    assert one.fingerprints() == two.fingerprints()
    assert set(one.fingerprints()) == {*one.sources, "eval"}
    assert not set(one.fingerprints().values()) & set(other.fingerprints().values())


def test_setting_up_again_changes_nothing():
    data = _alignment()
    before = data.fingerprints()
    data.setup("test")
    assert data.fingerprints() == before


def test_kinds_of_jailbreaks_can_be_evaluated():
    kinds = [Kind.JB_CO_TASK, Kind.JB_CO_TEXT, Kind.JB_MISGEN]
    data = _attack(eval_kinds=kinds)
    assert data.eval_kinds == [kind.value for kind in kinds]
    assert np.bincount(data.eval_rows["kind"].numpy()).tolist() == [20, 20, 20]
    assert UNSAFE in data.eval_prompts["jb_misgen"].texts.dominance_B
