"""Prompts of every kind: their operators and texts, their number, and their seeds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from temper.errors import TemperError
from temper.synthetic import Kind, Language, Prompts, language_spec
from temper.synthetic.language import CLASS_A, CLASS_C, MIXED, UNSAFE
from temper.synthetic.prompts import draw_batch, draw_prompts, prompt_keys

SIMPLE_KINDS = [kind for kind in Kind if kind != Kind.JB_MISGEN_TEXT]


def _drawn(language: Language, kind: Kind, n: int = 120) -> Prompts:
    return draw_batch(language, kind, n, "instruct", np.random.default_rng(11))


def _is_unsafe(language: Language, prompts: Prompts, row: int, operator: int) -> bool:
    kind = language.operator_class_GO[prompts.texts.grammar_B[row], operator]
    return bool(kind == CLASS_A or (kind == CLASS_C and prompts.texts.dominance_B[row] == UNSAFE))


def _safety(language: Language, prompts: Prompts) -> list[list[bool]]:
    """Per prompt, whether each operator other than the identity is unsafe."""
    return [
        [_is_unsafe(language, prompts, row, operator) for operator in operators if operator != 0]
        for row, operators in enumerate(prompts.operators_BO.tolist())
    ]


def _pairs(prompts: Prompts) -> list[list[int]]:
    return prompts.operators_BO.reshape(-1, 2).tolist()


@pytest.mark.parametrize("kind", [Kind.SAFE, Kind.UNSAFE, Kind.JB_CO_TASK, Kind.JB_CO_TEXT])
def test_safety_prompts_show_no_duplicate_or_task_operator(language, kind):
    assert set(_drawn(language, kind).operators_BO.ravel().tolist()) <= set(
        language.base_operators.tolist()
    )


def test_safe_prompts_hold_safe_operators_and_dominated_texts(language):
    prompts = _drawn(language, Kind.SAFE)
    assert not any(flag for flags in _safety(language, prompts) for flag in flags)
    assert not (prompts.texts.dominance_B == MIXED).any()


def test_unsafe_prompts_hold_unsafe_operators_or_the_identity(language):
    prompts = _drawn(language, Kind.UNSAFE)
    safety = _safety(language, prompts)
    assert all(all(flags) for flags in safety)
    assert all(flags for flags in safety), "a prompt of identities alone would be harmless"
    assert not (prompts.texts.dominance_B == MIXED).any()


def test_contextual_operators_are_as_safe_as_their_texts(language):
    def contextual(kind: Kind) -> set[int]:
        prompts = _drawn(language, kind, 400)
        classes = language.operator_class_GO[prompts.texts.grammar_B[:, None], prompts.operators_BO]
        return set(prompts.texts.dominance_B[(classes == CLASS_C).any(axis=1)].tolist())

    assert contextual(Kind.UNSAFE) == {UNSAFE}
    assert contextual(Kind.SAFE)
    assert UNSAFE not in contextual(Kind.SAFE)


def test_competing_tasks_pair_an_unsafe_with_a_safe_operator(simple):
    language = simple
    prompts = _drawn(language, Kind.JB_CO_TASK)
    unsafe_first = set()
    for row, operators in enumerate(prompts.operators_BO.tolist()):
        for pair in range(language.spec.n_pairs):
            two = operators[2 * pair : 2 * pair + 2]
            flags = [_is_unsafe(language, prompts, row, operator) for operator in two]
            assert 0 not in two
            assert sorted(flags) == [False, True]
            unsafe_first.add(flags[0])
    assert unsafe_first == {True, False}, "either order occurs"
    assert not (prompts.texts.dominance_B == MIXED).any()


def test_competing_texts_put_contextual_operators_on_mixed_text(language):
    prompts = _drawn(language, Kind.JB_CO_TEXT, 60)
    assert (prompts.texts.dominance_B == MIXED).all()
    for grammar, operators in zip(
        prompts.texts.grammar_B, prompts.operators_BO.tolist(), strict=True
    ):
        used = [operator for operator in operators if operator != 0]
        assert used
        assert all(language.operator_class_GO[grammar, operator] == CLASS_C for operator in used)


def test_mismatched_generalisation_uses_unsafe_duplicates_alone(simple):
    language = simple
    prompts = _drawn(language, Kind.JB_MISGEN)
    duplicates = set(language.duplicate_operators.tolist())
    assert {
        operator for operators in prompts.operators_BO.tolist() for operator in operators
    } <= duplicates | {0}
    safety = _safety(language, prompts)
    assert all(flags and all(flags) for flags in safety)


def test_task_prompts_pair_a_task_operator_with_the_identity(language):
    pairs = _pairs(_drawn(language, Kind.TASK, 200))
    tasks = set(language.task_operators.tolist())
    assert all(0 in pair and len(tasks & set(pair)) == 1 for pair in pairs)
    assert {operator for pair in pairs for operator in pair} == tasks | {0}
    assert {pair.index(0) for pair in pairs} == {0, 1}, "either slot occurs"


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind != Kind.TASK])
def test_no_other_stage_shows_a_task_operator(language, kind):
    if kind == Kind.JB_MISGEN_TEXT and language.spec.safety_texts == "dominance":
        pytest.skip("refused; see test_the_held_out_texts_need_the_released_branches")
    shown = set(_drawn(language, kind, 60).operators_BO.ravel().tolist())
    assert not shown & set(language.task_operators.tolist())


def test_instruction_shows_all_base_and_duplicate_operators(language):
    shown = set(_drawn(language, Kind.INSTRUCT, 2000).operators_BO.ravel().tolist())
    assert shown == {
        *language.base_operators.tolist(),
        *language.duplicate_operators.tolist(),
        *language.constant_operators.tolist(),
    }


def test_instruction_never_composes_duplicate_and_base(simple):
    language = simple
    duplicates = set(language.duplicate_operators.tolist())
    originals = set(language.base_operators.tolist()) - {0}
    rows = [
        set(operators) for operators in _drawn(language, Kind.INSTRUCT, 1000).operators_BO.tolist()
    ]
    # Neither within a pair nor across the pairs of a prompt.
    assert not any(row & duplicates and row & originals for row in rows)
    assert any(row & duplicates for row in rows)
    assert any(row & originals for row in rows)


@pytest.mark.parametrize(
    "kind", [Kind.INSTRUCT, Kind.SAFE, Kind.UNSAFE, Kind.JB_CO_TEXT, Kind.JB_MISGEN]
)
def test_half_of_the_pairs_hold_the_identity_in_either_slot(tiny, kind):
    pairs = _pairs(_drawn(tiny, kind, 2000))
    assert sum(0 in pair for pair in pairs) / len(pairs) == pytest.approx(0.5, abs=0.05)
    assert sum(pair[0] == 0 for pair in pairs) / len(pairs) == pytest.approx(0.25, abs=0.05)
    assert not any(pair == [0, 0] for pair in pairs)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_the_share_of_pairs_with_the_identity_follows_the_spec(probability):
    language = Language(language_spec("tiny", n_pairs=2, identity_probability=probability))
    pairs = _pairs(_drawn(language, Kind.UNSAFE))
    assert all((0 in pair) == (probability == 1.0) for pair in pairs)


@given(kind=st.sampled_from(SIMPLE_KINDS), n=st.integers(0, 60), seed=st.integers(0, 2**31 - 1))
def test_drawn_prompts_are_distinct_and_repeatable(kind, n, seed):
    language = Language(language_spec("tiny"))
    one, two = (
        draw_prompts(language, kind, n, "instruct", np.random.default_rng(seed)) for _ in range(2)
    )
    rows = [
        (tuple(o), tuple(t))
        for o, t in zip(one.operators_BO.tolist(), one.texts.letters_BT.tolist(), strict=True)
    ]
    assert len(one) == len(rows) == len(set(rows)) == n
    assert one.kind == kind
    assert prompt_keys(one) == prompt_keys(two)


def test_another_random_stream_draws_other_prompts(tiny):
    one, two = (
        draw_prompts(tiny, Kind.UNSAFE, 20, "instruct", np.random.default_rng(seed))
        for seed in (0, 1)
    )
    assert prompt_keys(one) != prompt_keys(two)


def test_keys_are_equal_exactly_where_prompts_are(tiny):
    prompts = draw_batch(tiny, Kind.TASK, 600, "instruct", np.random.default_rng(0))
    rows = [
        (tuple(o), tuple(t))
        for o, t in zip(
            prompts.operators_BO.tolist(), prompts.texts.letters_BT.tolist(), strict=True
        )
    ]
    assert len(set(rows)) < len(rows), "some are drawn twice, else this shows nothing"
    assert (
        len(set(zip(rows, prompt_keys(prompts), strict=True)))
        == len(set(rows))
        == len(set(prompt_keys(prompts)))
    )


def test_texts_of_prompts_belong_to_the_given_split(tiny):
    texts = {
        split: {
            tuple(t)
            for t in draw_prompts(
                tiny, Kind.SAFE, 60, split, np.random.default_rng(1)
            ).texts.letters_BT.tolist()
        }
        for split in ("alignment", "test")
    }
    assert not texts["alignment"] & texts["test"]


def test_more_prompts_than_the_language_has_are_refused():
    language = Language(
        language_spec("tiny", text_length=(3, 3), n_leaf_rules=1, n_task_operators=1)
    )
    with pytest.raises(
        TemperError,
        match=r"500 .*task prompts .*'instruct' split, \d+ found",
    ):
        draw_prompts(language, Kind.TASK, 500, "instruct", np.random.default_rng(0))


def test_a_kind_that_the_language_cannot_make_is_refused():
    language = Language(language_spec("tiny", n_duplicates=0))
    with pytest.raises(TemperError, match=r"no jb_misgen prompts .*n_duplicates"):
        draw_prompts(language, Kind.JB_MISGEN, 5, "test", np.random.default_rng(0))
