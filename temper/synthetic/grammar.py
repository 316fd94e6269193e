"""Probabilistic context-free grammars (PCFGs), sampled in batches.

A non-terminal of level i rewrites to two or three non-terminals of level i+1, a non-terminal of the
last level to three letters; all rules of a symbol are equally likely. The third level holds the
*concepts*: the first half are safe, the second half unsafe. Sampling tracks the concept behind each
letter, so the share of unsafe letters in a text is known exactly.

Shapes: `B` sentences, `N` symbols of a sentence.
"""

from dataclasses import dataclass

import numpy as np

from temper.synthetic.spec import LanguageSpec

PAD = -1
CONCEPT_LEVEL = 2  # index into LanguageSpec.levels
LEAF = 3  # letters per leaf rule


@dataclass(frozen=True)
class Grammar:
    """One PCFG.

    Attributes:
        rules: A table per level, ``rules[level][symbol, rule, position]``, padded with -1. It holds
            symbols of the next level; in the last table, letters.
        n_concepts: Non-terminals of the concept level.
    """

    rules: tuple[np.ndarray, ...]
    n_concepts: int

    def draw_sentences(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw ``n`` sentences from the root symbol.

        Returns:
            letters_BN and unsafe_BN (True for letters of an unsafe concept), padded on the right
            with -1 and False.
        """
        symbols_BN = np.zeros((n, 1), dtype=np.int64)
        unsafe_BN = np.zeros((n, 1), dtype=bool)
        for level, table in enumerate(self.rules):
            if level == CONCEPT_LEVEL:
                unsafe_BN = symbols_BN >= self.n_concepts // 2
            choice_BN = rng.integers(0, count_rules(table)[np.maximum(symbols_BN, 0)])
            expanded = table[np.maximum(symbols_BN, 0), choice_BN]
            expanded[symbols_BN == PAD] = PAD
            inherited = np.repeat(unsafe_BN, table.shape[2], axis=1)
            symbols_BN = expanded.reshape(n, -1)
            symbols_BN, unsafe_BN = _move_padding_right(symbols_BN, inherited & (symbols_BN != PAD))
        return symbols_BN, unsafe_BN


def count_rules(table: np.ndarray) -> np.ndarray:
    """Number of rules of each symbol."""
    counts: np.ndarray = (table[:, :, 0] != PAD).sum(axis=1)
    return counts


def _move_padding_right(
    symbols_BN: np.ndarray, flags_BN: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Move padding to the right end and drop columns that hold nothing else."""
    order = np.argsort(symbols_BN == PAD, axis=1, kind="stable")
    width = int((symbols_BN != PAD).sum(axis=1).max())
    order = order[:, :width]
    return np.take_along_axis(symbols_BN, order, 1), np.take_along_axis(flags_BN, order, 1)


def build_grammars(spec: LanguageSpec, rng: np.random.Generator) -> list[Grammar]:
    """Draw the inner rules once and the leaf triples once per grammar."""
    inner = []
    for level, width in enumerate(spec.levels[:-1]):
        n_rules = {0: spec.n_root_rules, 1: spec.n_second_rules}.get(level, 2)
        children = np.arange(spec.levels[level + 1])
        # Each rule that produces concepts produces concepts of one class, alternating. Texts
        # dominated by either class are then common; a mixed text spans two such rules.
        classes = np.array_split(children, 2) if level + 1 == CONCEPT_LEVEL else [children]
        inner.append(_inner_rules(width, n_rules, classes, rng))
    return [
        Grammar(rules=(*inner, _leaf_rules(spec, rng)), n_concepts=spec.levels[CONCEPT_LEVEL])
        for _ in range(spec.n_grammars)
    ]


def _inner_rules(
    width: int, n_rules: int, classes: list[np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """Draw ``n_rules`` rules of two or three children for each of ``width`` symbols."""
    table = np.full((width, n_rules, 3), PAD, dtype=np.int64)
    # Use each child at least once (if there are enough places): every concept stays reachable.
    pools = [list(rng.permutation(members)) for members in classes]
    for symbol in range(width):
        for rule in range(n_rules):
            turn = (symbol * n_rules + rule) % len(classes)
            for position in range(int(rng.integers(2, 4))):
                table[symbol, rule, position] = (
                    pools[turn].pop() if pools[turn] else rng.choice(classes[turn])
                )
    return table


def _leaf_rules(spec: LanguageSpec, rng: np.random.Generator) -> np.ndarray:
    """Draw distinct letter triples, ``n_leaf_rules`` for each symbol of the last level."""
    width = spec.levels[-1]
    codes = rng.choice(spec.n_letters**LEAF, size=width * spec.n_leaf_rules, replace=False)
    digits = [codes // spec.n_letters**power % spec.n_letters for power in range(LEAF)]
    return np.stack(digits, axis=-1).reshape(width, spec.n_leaf_rules, LEAF).astype(np.int64)
