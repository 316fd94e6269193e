"""Any combination of options gives valid rows, or is refused in one line."""

from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from temper.errors import TemperError
from temper.synthetic import PRESETS, Kind, Language, LanguageSpec, check_response, language_spec
from temper.synthetic.prompts import draw_prompts
from temper.synthetic.tokenizer import (
    answer_tokens,
    build_tokenizer,
    compliance_tokens,
    context_tokens,
    join_padded,
    prompt_tokens,
    refusal_tokens,
)

CHOICES = {
    name: get_args(hint)
    for name, hint in get_type_hints(LanguageSpec).items()
    if get_origin(hint) is not None and get_origin(hint) is not tuple and name != "window"
}
SIZES = {
    "n_letters": st.sampled_from([4, 8, 30, 40]),
    "n_grammars": st.integers(1, 5),
    "n_root_rules": st.integers(1, 3),
    "n_second_rules": st.integers(1, 3),
    "text_length": st.sampled_from([(1, 2), (3, 5), (25, 35), (36, 40), (500, 600)]),
    "n_pairs": st.integers(1, 3),
    "n_unsafe_operators": st.integers(0, 2),
    "n_contextual_operators": st.integers(0, 5),
    "n_safe_operators": st.integers(0, 2),
    "n_duplicates": st.sampled_from([0, 2, 6]),
    "n_task_operators": st.integers(0, 2),
    "n_constant_operators": st.integers(0, 3),
    "constant_share": st.sampled_from([0.0, 0.5, 1.0]),
    "identity_probability": st.sampled_from([0.0, 0.5, 1.0]),
    "second_probability": st.sampled_from([0.0, 0.2, 1.0]),
    "window": st.sampled_from([None, 40, 160]),
    "language_seed": st.integers(0, 3),
}
FIELDS = {name: st.sampled_from(values) for name, values in CHOICES.items()} | SIZES
# A preset with a few fields replaced: most combinations of many fields are refused.
OPTIONS = st.builds(
    lambda preset, names, values: (preset, {name: values[name] for name in names}),
    st.sampled_from(sorted(PRESETS)),
    st.lists(st.sampled_from(sorted(FIELDS)), max_size=4, unique=True),
    st.fixed_dictionaries(FIELDS),
)


def _unpadded(rows: np.ndarray) -> list[list[int]]:
    return [[token for token in row if token != -1] for row in rows.tolist()]


def test_the_options_are_named():
    assert CHOICES == {
        "rules": ("free", "released"),
        "safety_texts": ("dominance", "branches"),
        "operator_groups": ("rotating", "released"),
        "duplicates": ("by_class", "released"),
        "identities": ("per_pair", "released"),
        "refusal": ("token", "letter"),
        "counted": ("all", "one"),
    }


@settings(max_examples=150)
@given(options=OPTIONS, kind=st.sampled_from(list(Kind)), seed=st.integers(0, 9))
def test_any_options_give_valid_rows_or_one_line(options: tuple[str, dict[str, Any]], kind, seed):
    preset, fields = options
    try:
        language = Language(language_spec(preset, **fields))
        rng = np.random.default_rng(seed)
        prompts = draw_prompts(language, kind, 6, "alignment", rng)
    except TemperError as error:
        assert str(error)
        assert "\n" not in str(error)
        event("refused")
        return
    event("valid")
    spec = language.spec
    rows = zip(
        _unpadded(prompt_tokens(language, prompts)),
        _unpadded(answer_tokens(language, prompts)),
        _unpadded(
            join_padded([context_tokens(language, prompts), refusal_tokens(language, prompts)])
        ),
        strict=True,
    )
    assert compliance_tokens(language, prompts).shape[1] <= spec.response_length
    vocabulary = len(build_tokenizer(spec))
    for prompt, answer, refusal in rows:
        assert max(prompt + answer + refusal) < vocabulary
        assert len(prompt) + max(len(answer), len(refusal)) <= spec.longest_row
        assert spec.window is None or len(prompt) + len(answer) <= spec.window
        right = check_response(language, prompt, answer)
        assert (right.correct, right.refused, right.label) == (True, False, "harmful")
        if kind == Kind.INSTRUCT:
            continue  # nothing is refused there
        assert not right.degenerate
        refused = check_response(language, prompt, refusal)
        assert (refused.correct, refused.refused, refused.degenerate) == (False, True, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rules": "drawn"}, r"rules='drawn': choose one of free, released"),
        ({"n_pairs": "2"}, r"n_pairs='2': give a whole number"),
        ({"n_pairs": True}, r"n_pairs=True: give a whole number"),
        ({"n_pairs": 0}, r"n_pairs=0: give at least 1"),
        ({"levels": "136"}, r"levels='136': give a list of whole"),
        ({"levels": (1, 3, 6.5)}, r"levels=\(1, 3, 6.5\): give whole numbers"),
        ({"levels": (1, 3, 6, 0)}, r"levels=\(1, 3, 6, 0\): "),
        ({"text_length": (3, 4, 5)}, r"text_length=\(3, 4, 5\): give two numbers"),
        ({"dominance": "0.6"}, r"dominance='0.6': give a number"),
        ({"window": 1.5}, r"window=1.5: give a whole number"),
        ({"rules": "released"}, r"levels=\(1, 3, 6\): .*needs levels=\(1, 3, 6, 5, 5, 6\)"),
        ({"safety_texts": "branches"}, r"rules='free': .*needs rules=released"),
        (
            {"operator_groups": "released", "n_safe_operators": 3},
            r"n_safe_operators=3: operator_groups=released needs n_safe_operators=2",
        ),
        (
            {"operator_groups": "released", "n_grammars": 5},
            r"n_grammars=5: operator_groups=released knows 4",
        ),
        (
            {"duplicates": "released", "n_duplicates": 4},
            r"n_duplicates=4: duplicates=released needs n_duplicates=6",
        ),
        ({"identities": "released"}, r"duplicates='by_class': identities=released needs"),
        ({"counted": "one", "n_pairs": 1}, r"n_pairs=1: counted=one needs n_pairs=2"),
        ({"second_probability": 0.2}, r"counted='all': second_probability=0.2 needs counted=one"),
        ({"n_constant_operators": 1}, r"constant_share=0.0 with n_constant_operators=1: "),
        ({"n_constant_operators": 3, "constant_share": 0.1}, r"n_constant_operators=3: at most 2"),
        ({"window": 100}, r"window=100: the longest row has 116 tokens; give window=116"),
        (
            {"n_unsafe_operators": 0, "n_contextual_operators": 0, "n_safe_operators": 0},
            r"n_safe_operators=0: there is no operator besides the identity",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(TemperError, match=message) as caught:
        LanguageSpec(**fields)
    assert "\n" not in str(caught.value)


def test_the_paper_preset_is_all_released():
    spec = language_spec("paper")
    assert {name: getattr(spec, name) for name in CHOICES} == {
        name: values[1] for name, values in CHOICES.items()
    }
    simple = {name: values[0] for name, values in CHOICES.items()}
    for preset in ("small", "tiny"):
        assert {name: getattr(language_spec(preset), name) for name in CHOICES} == simple


def test_each_released_option_can_be_switched_off_alone():
    for name, values in CHOICES.items():
        needs = {
            "rules": {"safety_texts": "dominance"},
            "duplicates": {"identities": "per_pair"},
            "counted": {"second_probability": 0.0},
        }.get(name, {})
        language = Language(language_spec("paper", **{name: values[0]}, **needs))
        draw_prompts(language, Kind.UNSAFE, 20, "alignment", np.random.default_rng(0))


def test_a_row_longer_than_the_window_is_refused():
    assert language_spec("paper").longest_row <= 160
    with pytest.raises(TemperError, match=r"window=160: the longest row has 163 tokens; .*"):
        language_spec("paper", text_length=(25, 38))
    assert language_spec("paper", text_length=(25, 38), window=163).longest_row == 163
