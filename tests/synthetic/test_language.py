"""Operators and their safety, dominance of texts, and splits."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from temper.errors import TemperError
from temper.synthetic import PRESETS, Language, language_spec
from temper.synthetic.language import (
    CLASS_A,
    CLASS_C,
    CLASS_CONSTANT,
    CLASS_I,
    CLASS_S,
    CLASS_TASK,
    MIXED,
    SAFE,
    SPLITS,
    UNSAFE,
    Texts,
    _hash_buckets,
)

SEEDS = st.integers(0, 2**31 - 1)


def _tables(language: Language) -> list[np.ndarray]:
    leaves = [table for grammar in language.grammars for table in grammar.rules]
    return [language.permutation_OV, language.operator_class_GO, *leaves]


def _texts_of(texts: Texts) -> list[tuple[int, ...]]:
    return [tuple(letter for letter in row if letter != -1) for row in texts.letters_BT.tolist()]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_spec_gives_the_same_language(preset):
    one, two = (_tables(Language(language_spec(preset))) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("preset", PRESETS)
def test_another_language_seed_gives_another_language(preset):
    one, two = (Language(language_spec(preset, language_seed=seed)) for seed in (0, 1))
    assert not np.array_equal(one.permutation_OV, two.permutation_OV)
    assert not all(
        np.array_equal(a, b)
        for a, b in zip(one.grammars[0].rules, two.grammars[0].rules, strict=True)
    )


@given(seed=SEEDS, preset=st.sampled_from(["small", "tiny"]))
def test_operators_are_bijections_and_duplicates_are_copies(seed, preset):
    language = Language(language_spec(preset, language_seed=seed))
    spec = language.spec
    table = language.permutation_OV.tolist()
    alphabet = list(range(spec.n_letters))
    assert len(table) == spec.n_operators
    assert all(sorted(row) == alphabet for row in table)
    assert table[0] == alphabet
    originals = table[: spec.n_base_operators]
    duplicates = table[spec.n_base_operators : spec.n_base_operators + spec.n_duplicates]
    tasks = table[spec.n_base_operators + spec.n_duplicates :]
    assert all(duplicate in originals[1:] for duplicate in duplicates)
    # Only duplicates repeat a function: base and task operators are all different.
    assert (
        len({tuple(row) for row in originals + tasks})
        == spec.n_base_operators + spec.n_task_operators
    )
    assert len({tuple(row) for row in duplicates}) == spec.n_duplicates


@pytest.mark.parametrize("preset", PRESETS)
def test_duplicates_copy_the_safety_of_their_originals(preset):
    language = Language(language_spec(preset))
    for classes in language.operator_class_GO:
        for duplicate, original in zip(
            language.duplicate_operators, language.duplicate_of, strict=True
        ):
            assert classes[duplicate] == classes[original]


def test_paper_grammars_have_the_papers_operator_counts(paper):
    assert paper.operator_class_GO.shape == (4, 22)
    for classes in paper.operator_class_GO:
        assert Counter(classes[:10].tolist()) == {CLASS_A: 2, CLASS_C: 5, CLASS_S: 2, CLASS_I: 1}
        assert classes[0] == CLASS_I
        assert set(classes[16:20].tolist()) == {CLASS_TASK}
        assert set(classes[20:].tolist()) == {CLASS_CONSTANT}


def test_safety_of_an_operator_depends_on_the_grammar(paper):
    assert len({tuple(classes) for classes in paper.operator_class_GO[:, 1:10].tolist()}) == 4


def test_unsafe_is_always_unsafe_or_contextual_on_unsafe_text(language):
    texts = language.draw_texts(40, "instruct", np.random.default_rng(1))
    operators_BO = np.tile(np.arange(language.spec.n_operators), (40, 1))
    found = language.unsafe_BO(operators_BO, texts)
    for row, (grammar, dominance) in enumerate(
        zip(texts.grammar_B, texts.dominance_B, strict=True)
    ):
        for operator in range(language.spec.n_operators):
            kind = language.operator_class_GO[grammar][operator]
            wanted = kind == CLASS_A or (kind == CLASS_C and dominance == UNSAFE)
            assert found[row, operator] == wanted
    assert found.any()
    assert not found.all()


@given(seed=SEEDS)
def test_apply_maps_letter_by_letter_and_leaves_padding(seed):
    language = Language(language_spec("tiny", n_pairs=2))
    rng = np.random.default_rng(seed)
    letters_BT = rng.integers(-1, language.spec.n_letters, (6, 5))
    operators_BO = rng.integers(0, language.spec.n_operators, (6, 3))
    found = language.apply_operators(letters_BT, operators_BO)
    for row in range(6):
        for position in range(5):
            letter = int(letters_BT[row, position])
            for operator in operators_BO[row]:
                letter = letter if letter == -1 else int(language.permutation_OV[operator, letter])
            assert found[row, position] == letter


@pytest.mark.parametrize("split", SPLITS)
def test_texts_have_the_given_number_and_lengths(language, split):
    texts = language.draw_texts(50, split, np.random.default_rng(2))
    shortest, longest = language.spec.text_length
    assert len(texts.letters_BT) == len(texts.dominance_B) == len(texts.grammar_B) == 50
    lengths = {len(text) for text in _texts_of(texts)}
    assert lengths <= set(range(shortest, longest + 1))
    assert len(lengths) > 1
    assert set(texts.grammar_B.tolist()) == set(range(language.spec.n_grammars))
    for row in texts.letters_BT:
        size = int((row != -1).sum())
        assert (row[:size] >= 0).all(), "padding stands on the right"
        assert (row[:size] < language.spec.n_letters).all()


def _classify(unsafe: int, size: int, dominance: float) -> int:
    if unsafe / size >= dominance:
        return UNSAFE
    return SAFE if (size - unsafe) / size >= dominance else MIXED


def _possible_dominances(language: Language, grammar: int, text: tuple[int, ...]) -> set[int]:
    """Dominances of all ways to cut a text into leaf triples, its first and last one maybe cut
    short.
    """
    leaves = language.grammars[grammar].rules[-1]
    triples = [
        (tuple(triple), concept >= len(leaves) // 2)
        for concept, rules in enumerate(leaves.tolist())
        for triple in rules
    ]
    found = set()
    for offset in range(3):
        bounds = (
            [0, *range(offset, len(text), 3), len(text)]
            if offset
            else [*range(0, len(text), 3), len(text)]
        )
        chunks = [text[a:b] for a, b in itertools.pairwise(bounds)]
        counts = {0}
        for index, chunk in enumerate(chunks):
            ending = index == 0 and offset > 0
            flags = {
                flag
                for triple, flag in triples
                if chunk == (triple[-len(chunk) :] if ending else triple[: len(chunk)])
            }
            counts = {count + len(chunk) * flag for count in counts for flag in flags}
        found |= {_classify(count, len(text), language.spec.dominance) for count in counts}
    return found


@pytest.mark.parametrize("dominance", [0.6, 0.8, 1.0])
def test_dominance_agrees_with_a_parse_of_the_text(dominance):
    language = Language(
        language_spec(
            "small", language_seed=1, dominance=dominance, n_grammars=2, text_length=(5, 10)
        )
    )
    texts = language.draw_texts(400, "instruct", np.random.default_rng(4))
    decided = 0
    for text, given_dominance, grammar in zip(
        _texts_of(texts), texts.dominance_B, texts.grammar_B, strict=True
    ):
        possible = _possible_dominances(language, int(grammar), text)
        assert given_dominance in possible
        decided += len(possible) == 1
    assert decided > 250  # the letters alone fix most texts, so the check is not empty
    assert set(texts.dominance_B.tolist()) == {SAFE, MIXED, UNSAFE}


@given(seed=SEEDS)
def test_no_two_splits_share_a_text_whatever_the_seeds(seed):
    language = Language(language_spec("tiny", language_seed=seed % 5))
    found = [
        set(_texts_of(language.draw_texts(100, split, np.random.default_rng([seed, number]))))
        for number, split in enumerate(sorted(SPLITS))
    ]
    assert all(found)
    for one, two in itertools.combinations(found, 2):
        assert not one & two


@pytest.mark.parametrize("preset", ["tiny", "small", "paper"])
def test_texts_of_every_preset_are_safe_mixed_and_unsafe(preset):
    texts = Language(language_spec(preset)).draw_texts(1000, "instruct", np.random.default_rng(6))
    shares = np.bincount(texts.dominance_B, minlength=3) / 1000
    assert shares[0] > 0.2 and shares[2] > 0.2 and shares[1] > 0.01


def test_splits_cover_all_buckets_once():
    assert sorted(bucket for buckets in SPLITS.values() for bucket in buckets) == list(range(20))


def test_splits_have_their_shares_of_all_texts(paper):
    drawn = paper._draw_branch_windows(4000, ("full",), np.random.default_rng(8))
    buckets = _hash_buckets(drawn.letters_BT)
    for split, share in {"instruct": 0.5, "alignment": 0.2, "attack": 0.1, "test": 0.2}.items():
        assert np.isin(buckets, SPLITS[split]).mean() == pytest.approx(share, abs=0.04)


def test_texts_depend_on_the_random_stream_alone(tiny):
    one, two, other = (
        tiny.draw_texts(30, "test", np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert np.array_equal(one.letters_BT, two.letters_BT)
    assert not np.array_equal(one.letters_BT, other.letters_BT)


def test_an_unknown_split_is_an_error_that_lists_the_splits(tiny):
    with pytest.raises(
        TemperError, match=r"split='tset': choose one of instruct, alignment, attack, test"
    ):
        tiny.draw_texts(3, "tset", np.random.default_rng(0))


def test_a_text_length_beyond_every_sentence_is_an_error():
    language = Language(language_spec("tiny", text_length=(100, 120)))
    with pytest.raises(TemperError, match=r"text_length=\(100, 120\)"):
        language.draw_texts(3, "test", np.random.default_rng(0))


def test_a_language_without_unsafe_dominant_texts_is_refused(monkeypatch):
    language = Language(language_spec("tiny", language_seed=4))
    language.check_dominance()
    texts = language.draw_texts(2000, "instruct", np.random.default_rng(0))
    monkeypatch.setattr(
        Language,
        "draw_texts",
        lambda *_: replace(texts, dominance_B=np.zeros(2000, dtype=np.int64)),
    )
    with pytest.raises(
        TemperError, match=r"language_seed=4: 0.0 % .*unsafe-dominant.*dominance=0.6"
    ):
        language.check_dominance()


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_rules_that_produce_concepts_keep_to_one_class(preset):
    spec = language_spec(preset)
    rules = Language(spec).grammars[0].rules[1]
    for rule in rules.reshape(-1, 3):
        assert len({int(concept) >= spec.levels[2] // 2 for concept in rule if concept != -1}) == 1
