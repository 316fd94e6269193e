"""Presets, overrides and invalid sizes of the language."""

from dataclasses import replace

import pytest

from temper.errors import TemperError
from temper.synthetic import PRESETS, LanguageSpec, language_spec


def test_the_paper_preset_has_the_sizes_of_the_paper():
    spec = language_spec("paper")
    assert (spec.n_letters, spec.n_grammars, spec.text_length) == (30, 4, (25, 35))
    assert spec.levels == (1, 3, 6, 5, 5, 6)
    assert sum(spec.levels) == 26
    assert (spec.n_root_rules, spec.n_second_rules, spec.n_leaf_rules) == (2, 3, 2)
    assert spec.n_base_operators == 10
    assert spec.n_base_operators + spec.n_duplicates == 16
    assert (spec.n_unsafe_operators, spec.n_contextual_operators, spec.n_safe_operators) == (
        2,
        5,
        2,
    )
    assert spec.levels[2] == 6
    assert (spec.n_pairs, spec.identity_probability) == (2, 0.5)


def test_prompt_and_response_of_the_paper_fit_its_window_of_160():
    spec = language_spec("paper")
    assert spec.prompt_length == 1 + 4 + 1 + 35 + 1
    assert spec.response_length == 2 * 36 + 1
    assert spec.prompt_length + spec.response_length <= 160


@pytest.mark.parametrize("preset", PRESETS)
def test_operators_are_base_duplicate_task_and_constant_ones(preset):
    spec = language_spec(preset)
    assert spec.n_operators == (
        spec.n_base_operators
        + spec.n_duplicates
        + spec.n_task_operators
        + spec.n_constant_operators
    )


def test_an_override_replaces_one_field_of_a_preset():
    before = PRESETS["tiny"]
    spec = language_spec("tiny", language_seed=7)
    assert spec == replace(before, language_seed=7)
    assert PRESETS["tiny"] == before
    assert before.language_seed == 0


def test_an_unknown_preset_is_an_error_that_lists_the_presets():
    with pytest.raises(TemperError, match=r"preset='tinny': choose one of tiny, small, paper"):
        language_spec("tinny")


def test_an_unknown_field_is_an_error_that_lists_the_fields():
    with pytest.raises(TemperError, match=r"no field 'letters'; fields are .*n_letters"):
        language_spec("tiny", letters=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": (1, 3)}, r"levels=\(1, 3\): .*such as \(1, 3, 6\)"),
        ({"levels": (2, 3, 6)}, r"levels=\(2, 3, 6\): .*one root first"),
        ({"levels": (1, 3, 1)}, r"levels=\(1, 3, 1\): .*at least two concepts"),
        ({"text_length": (5, 3)}, r"text_length=\(5, 3\): .*shortest <= longest"),
        ({"text_length": (0, 3)}, r"text_length=\(0, 3\): .*1 <= shortest"),
        ({"dominance": 0.5}, r"dominance=0.5: give a share in \(0.5, 1\]"),
        ({"dominance": 1.1}, r"dominance=1.1: give a share"),
        ({"n_duplicates": 10}, r"n_duplicates=10: at most 9"),
        ({"n_letters": 3}, r"n_letters=3: .*give at least 4"),
    ],
)
def test_an_invalid_size_is_an_error_with_its_name_and_value(fields, message):
    with pytest.raises(TemperError, match=message):
        LanguageSpec(**fields)
