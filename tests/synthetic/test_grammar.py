"""Rule tables of grammars, and sentences checked by an independent parser."""

from functools import cache

import numpy as np
import pytest

from temper.synthetic import Language, language_spec
from temper.synthetic.grammar import PAD, Grammar


def _rules(grammar: Grammar) -> int:
    return sum(
        1 for table in grammar.rules for symbol in table for choice in symbol if choice[0] != PAD
    )


def _parses(grammar: Grammar, letters: list[int], unsafe: list[bool]) -> bool:
    """Whether the root derives the letters with every letter's flag that of the concept above
    it.
    """

    @cache
    def ends(level: int, symbol: int, start: int) -> frozenset[int]:
        if level == len(grammar.rules):
            return frozenset(
                {start + 1} if start < len(letters) and letters[start] == symbol else ()
            )
        found: set[int] = set()
        for choice in grammar.rules[level][symbol].tolist():
            frontier = {start} if choice[0] != PAD else set()
            for child in choice:
                if child != PAD:
                    frontier = {end for begin in frontier for end in ends(level + 1, child, begin)}
            found |= frontier
        if level == 2:
            is_unsafe = symbol >= grammar.n_concepts // 2
            found = {end for end in found if all(flag == is_unsafe for flag in unsafe[start:end])}
        return frozenset(found)

    return len(letters) in ends(0, 0, 0)


def test_the_paper_grammars_have_55_rules_each(paper):
    assert [_rules(grammar) for grammar in paper.grammars] == [55] * 4


def test_paper_grammars_differ_in_leaf_triples_alone(paper):
    first, *others = paper.grammars
    for other in others:
        for mine, theirs in zip(first.rules[:-1], other.rules[:-1], strict=True):
            assert np.array_equal(mine, theirs)
    leaves = [
        {tuple(triple) for triple in grammar.rules[-1].reshape(-1, 3).tolist()}
        for grammar in paper.grammars
    ]
    assert len({frozenset(triples) for triples in leaves}) == 4


def test_the_paper_grammars_rewrite_six_times(paper):
    for grammar in paper.grammars:
        assert [len(table) for table in grammar.rules] == [1, 3, 6, 5, 5, 6]
        n_rules = [(table[:, :, 0] != PAD).sum(axis=1) for table in grammar.rules]
        assert [set(counts.tolist()) for counts in n_rules] == [{2}, {3}, {2}, {2}, {2}, {2}]


@pytest.mark.parametrize("preset", ["tiny", "small", "paper"])
def test_inner_rules_branch_and_reach_every_symbol(preset):
    grammar = Language(language_spec(preset)).grammars[0]
    for table, below in zip(grammar.rules[:-1], grammar.rules[1:], strict=True):
        assert set((table != PAD).sum(axis=2).ravel().tolist()) <= {2, 3}
        assert set(table[table != PAD].tolist()) == set(range(len(below)))


@pytest.mark.parametrize("preset", ["tiny", "small", "paper"])
def test_leaf_triples_are_unique_and_in_the_alphabet(preset):
    language = Language(language_spec(preset))
    for grammar in language.grammars:
        triples = [tuple(triple) for triple in grammar.rules[-1].reshape(-1, 3).tolist()]
        assert len(set(triples)) == len(triples)
        assert {letter for triple in triples for letter in triple} <= set(
            range(language.spec.n_letters)
        )


@pytest.mark.parametrize(("preset", "n"), [("tiny", 40), ("small", 40), ("paper", 3)])
def test_sentences_parse_with_the_concept_of_every_letter(preset, n):
    for grammar in Language(language_spec(preset)).grammars:
        letters_BN, unsafe_BN = grammar.draw_sentences(n, np.random.default_rng(3))
        assert unsafe_BN.any()
        assert not unsafe_BN[letters_BN == PAD].any()
        for letters, unsafe in zip(letters_BN, unsafe_BN, strict=True):
            size = int((letters != PAD).sum())
            assert (letters[:size] != PAD).all(), "padding stands on the right"
            flags = unsafe[:size].tolist()
            assert _parses(grammar, letters[:size].tolist(), flags)
            assert not _parses(grammar, letters[:size].tolist(), [not flag for flag in flags])


def test_choices_are_uniform(paper):
    grammar = paper.grammars[0]
    letters_BN, _ = grammar.draw_sentences(4000, np.random.default_rng(5))
    # Lengths of sentences follow from the rules: compare their mean with the exact expectation.
    lengths = [np.full(len(grammar.rules[-1]), 3.0)]
    for table in reversed(grammar.rules[:-1]):
        child = np.where(table == PAD, 0.0, lengths[-1][np.maximum(table, 0)])
        lengths.append(child.sum(axis=2).mean(axis=1))
    observed = (letters_BN != PAD).sum(axis=1)
    assert abs(observed.mean() - lengths[-1][0]) < 4 * observed.std() / 4000**0.5
