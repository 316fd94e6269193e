"""Probabilistic context-free grammars, sampled by the batch.

A grammar is a ladder of levels: a non-terminal of level i rewrites to two or three non-terminals
of level i+1, one of the last level to three letters; choices are uniform. The third level holds the
*concepts*, the first half safe, the second unsafe. Every letter remembers the concept it came
from, so a window's make-up is known exactly.

Shapes: `B` texts, `N` symbols of a sentence, `T` letters of a text.
"""

from dataclasses import dataclass

import numpy as np

from temper.synthetic.spec import LanguageSpec

PAD = -1
CONCEPT_LEVEL = 2
LEAF = 3  # letters per leaf production


@dataclass(frozen=True)
class Grammar:
    """Rules as index tables: ``rules[level][symbol, choice, position]``, padded with -1."""

    rules: tuple[np.ndarray, ...]
    n_concepts: int

    def sentences(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw ``n`` sentences from the root.

        Returns:
            letters_BN and unsafe_BN (True where the letter comes from an unsafe concept), padded
            on the right with -1 and False.
        """
        symbols_BN = np.zeros((n, 1), dtype=np.int64)
        unsafe_BN = np.zeros((n, 1), dtype=bool)
        for level, table in enumerate(self.rules):
            if level == CONCEPT_LEVEL:
                unsafe_BN = symbols_BN >= self.n_concepts // 2
            choice_BN = rng.integers(0, _choices(table)[np.maximum(symbols_BN, 0)])
            expanded = table[np.maximum(symbols_BN, 0), choice_BN]
            expanded[symbols_BN == PAD] = PAD
            provenance = np.repeat(unsafe_BN, table.shape[2], axis=1)
            symbols_BN = expanded.reshape(n, -1)
            symbols_BN, unsafe_BN = _compact(symbols_BN, provenance & (symbols_BN != PAD))
        return symbols_BN, unsafe_BN


def _choices(table: np.ndarray) -> np.ndarray:
    counts: np.ndarray = (table[:, :, 0] != PAD).sum(axis=1)
    return counts


def _compact(symbols_BN: np.ndarray, flags_BN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move the padding to the right end and cut what is padding everywhere."""
    order = np.argsort(symbols_BN == PAD, axis=1, kind="stable")
    width = int((symbols_BN != PAD).sum(axis=1).max())
    order = order[:, :width]
    return np.take_along_axis(symbols_BN, order, 1), np.take_along_axis(flags_BN, order, 1)


def build_grammars(spec: LanguageSpec, rng: np.random.Generator) -> list[Grammar]:
    """Draw the inner rules once and the leaf triples once per grammar."""
    inner = []
    for level, width in enumerate(spec.levels[:-1]):
        n_rules = spec.n_root_rules if level == 0 else 2
        children = np.arange(spec.levels[level + 1])
        # A rule that writes concepts writes concepts of one class, by turns: so texts dominated by
        # either class are common, and a text of mixed concepts is one that spans two such rules.
        classes = np.array_split(children, 2) if level + 1 == CONCEPT_LEVEL else [children]
        inner.append(_inner_rules(width, n_rules, classes, rng))
    return [
        Grammar(rules=(*inner, _leaf_rules(spec, rng)), n_concepts=spec.levels[CONCEPT_LEVEL])
        for _ in range(spec.n_grammars)
    ]


def _inner_rules(
    width: int, n_rules: int, classes: list[np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    table = np.full((width, n_rules, 3), PAD, dtype=np.int64)
    # Each child is used at least once (where there is room), else a concept could be unreachable.
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
    width = spec.levels[-1]
    codes = rng.choice(spec.n_letters**LEAF, size=width * spec.n_leaf_rules, replace=False)
    digits = [codes // spec.n_letters**power % spec.n_letters for power in range(LEAF)]
    return np.stack(digits, axis=-1).reshape(width, spec.n_leaf_rules, LEAF).astype(np.int64)
