"""Grammars with the released statistics, and the sub-grammars of safe and unsafe texts.

Facts of the released generator of Jain et al. 2024 (arXiv 2407.10264): a root with two rules, three
second-level symbols with three, six concepts and two further inner levels with two rules a symbol,
then letter triples: 26 non-terminals, 2 + 9 + 12 + 10 + 10 + 12 = 55 rules. Rules have three
children, but for the root's (two), one rule of each second-level symbol, three of two concepts and
one of one fourth-level symbol (two). So a concept has 54 to 81 letters and a sample of four to six
concepts 261 to 486. Which symbols stand in the rules is drawn by us.

The *branches* are sub-grammars for texts of known safety; in the unsafe ones each rule of the fifth
level lacks one child, so that their texts differ from the full grammar's:

* ``full``: whole samples (391 to 395 letters in the mean);
* ``safe``: one safe concept (72);
* ``unsafe``: one to three unsafe concepts (76);
* ``intermediate``: a fourth-level symbol of a safe concept and one of an unsafe one, in either
  order (52);
* ``id_mg``: a part of the unsafe rules, in safety training (49);
* ``ood_mg``: rules of the last concept that ``id_mg`` lacks, held out for testing (45).

Shapes: `K` starts of a branch, `S` fourth-level symbols of a start, `R` rules of a symbol, `C`
children of a rule, `G` grammars, `B` texts, `T` letters of a text.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import numpy as np

from temper.synthetic.grammar import LEAF, PAD, Grammar, count_rules
from temper.synthetic.spec import RELEASED_LEVELS, LanguageSpec

BranchName = Literal["full", "safe", "unsafe", "intermediate", "id_mg", "ood_mg"]
BRANCHES: tuple[BranchName, ...] = get_args(BranchName)

N_SAFE = 3  # of the six concepts; the others are unsafe
# Children of the two rules of every concept, and how many of them are the short symbol.
CONCEPT_RULES = (
    ((3, 0), (3, 1)),
    ((2, 0), (3, 1)),
    ((2, 0), (3, 0)),
    ((3, 1), (3, 0)),
    ((3, 2), (3, 1)),
    ((3, 1), (3, 0)),
)
CONCEPT_MEANS = np.array([78.75, 65.25, 67.5, 78.75, 74.25, 78.75])  # letters, follow from those
CONCEPT_LEAST = np.array([72, 54, 54, 72, 63, 72])
SECOND_RULES = (2, 3, 3)  # concepts of the three rules of each second-level symbol
SAFE_SHARES = (5 / 12, 17 / 48, 11 / 48)  # of the safe concepts with 78.75, 67.5, 65.25 letters
LETTERS = 9  # of a fifth-level symbol, three leaf triples
SHORTEST = 261
MEAN = (391.0, 395.0)


@dataclass(frozen=True)
class Branch:
    """A sub-grammar: sequences of fourth-level symbols with their probabilities, and the rules of
    the levels below but the leaf triples, which differ from grammar to grammar.

    Attributes:
        starts_KS: Fourth-level symbols, padded on the right with -1.
        concepts_KS: Concept behind each of them.
        occurrences_KS: Number, from 0, of the concept's occurrence within the start.
        probability_K: Probability of each start.
        fourth: Table ``5 x R x 3`` of fifth-level symbols, padded with -1.
        fifth: Table ``5 x R x C`` of sixth-level symbols, all in use.
    """

    starts_KS: np.ndarray
    concepts_KS: np.ndarray
    occurrences_KS: np.ndarray
    probability_K: np.ndarray
    fourth: np.ndarray
    fifth: np.ndarray

    @property
    def letters(self) -> int:
        """Letters of each fifth-level symbol."""
        return int(self.fifth.shape[2]) * LEAF

    def mean_letters(self) -> float:
        """Expected number of letters of a sample, exactly."""
        children = (self.fourth != PAD).sum(axis=2).sum(axis=1) / count_rules(self.fourth)
        symbols_KS = np.where(self.starts_KS == PAD, 0.0, children[self.starts_KS])
        return float(self.probability_K @ symbols_KS.sum(axis=1)) * self.letters

    def bounds(self) -> tuple[int, int]:
        """Letters of the shortest and of the longest sample."""
        children = (self.fourth != PAD).sum(axis=2)
        least = np.where(self.fourth[:, :, 0] == PAD, 9, children).min(axis=1)
        most = children.max(axis=1)
        present = self.starts_KS != PAD
        return (
            int(np.where(present, least[self.starts_KS], 0).sum(axis=1).min()) * self.letters,
            int(np.where(present, most[self.starts_KS], 0).sum(axis=1).max()) * self.letters,
        )

    def draw_windows(
        self,
        leaves_GSRT: np.ndarray,
        grammar_B: np.ndarray,
        text_length: tuple[int, int],
        rng: np.random.Generator,
    ) -> "Windows":
        """Cut a random window out of a new sample for each entry of ``grammar_B``. Only the part
        of a sample that lies in the window is written out; samples shorter than the drawn length
        give all they have.
        """
        n = len(grammar_B)
        n_rules = count_rules(self.fourth)
        n_children = (self.fourth != PAD).sum(axis=2)
        start_B = rng.choice(len(self.starts_KS), n, p=self.probability_K)
        upper_BS = self.starts_KS[start_B]
        rule_BS = rng.integers(0, n_rules[upper_BS])
        children_BS = np.where(upper_BS == PAD, 0, n_children[upper_BS, rule_BS])
        end_BS = children_BS.cumsum(axis=1)
        size_B = end_BS[:, -1] * self.letters

        shortest, longest = text_length
        length_B = np.minimum(rng.integers(shortest, longest + 1, n), size_B)
        begin_B = rng.integers(0, size_B - length_B + 1)
        # The fifth-level symbols (`N`) that a window touches, the fourth-level ones above them, and
        # their letters.
        number_BN = begin_B[:, None] // self.letters + np.arange(longest // self.letters + 2)
        number_BN = np.minimum(number_BN, end_BS[:, -1:] - 1)
        above_BN = (end_BS[:, None, :] <= number_BN[:, :, None]).sum(axis=2)
        child_BN = number_BN - np.take_along_axis(end_BS - children_BS, above_BN, 1)
        fifth_BN = self.fourth[
            np.take_along_axis(upper_BS, above_BN, 1),
            np.take_along_axis(rule_BS, above_BN, 1),
            child_BN,
        ]
        sixth = self.fifth[fifth_BN, rng.integers(0, self.fifth.shape[1], fifth_BN.shape)]
        choice = rng.integers(0, leaves_GSRT.shape[2], sixth.shape)
        letters_BN = leaves_GSRT[grammar_B[:, None, None], sixth, choice].reshape(n, -1)

        position_BT = begin_B[:, None] % self.letters + np.arange(longest)
        inside_BT = np.arange(longest) < length_B[:, None]
        above_BT = np.take_along_axis(above_BN, position_BT // self.letters, 1)
        letters_BT = np.take_along_axis(letters_BN, position_BT, 1)
        return Windows(
            letters_BT=np.where(inside_BT, letters_BT, PAD),
            concepts_BT=np.where(inside_BT, self.concepts_KS[start_B[:, None], above_BT], PAD),
            occurrences_BT=np.where(
                inside_BT, self.occurrences_KS[start_B[:, None], above_BT], PAD
            ),
        )


@dataclass(frozen=True)
class Windows:
    """Windows of samples, padded on the right with -1: letters, and the concept and the number of
    its occurrence in the sample behind each letter.
    """

    letters_BT: np.ndarray
    concepts_BT: np.ndarray
    occurrences_BT: np.ndarray


@dataclass(frozen=True)
class ReleasedRules:
    """Rules drawn with the released lengths: the tables of the inner levels, and the branches."""

    inner: tuple[np.ndarray, ...]
    branches: dict[BranchName, Branch]


def draw_rules(rng: np.random.Generator) -> ReleasedRules:
    """Draw inner rules with the released lengths, and make the branches of them."""
    inner = _draw_inner(rng)
    return ReleasedRules(inner, {"full": _full_branch(inner), **_safety_branches(inner, rng)})


def build_released_grammars(
    spec: LanguageSpec, rules: ReleasedRules, rng: np.random.Generator
) -> list[Grammar]:
    """The grammars of the language: the same inner rules, with leaf triples of their own."""
    return [
        Grammar(rules=(*rules.inner, _leaf_rules(spec, rng)), n_concepts=RELEASED_LEVELS[2])
        for _ in range(spec.n_grammars)
    ]


def _leaf_rules(spec: LanguageSpec, rng: np.random.Generator) -> np.ndarray:
    """Distinct triples that use every letter, if there are places enough."""
    shape = (RELEASED_LEVELS[-1], spec.n_leaf_rules, LEAF)
    places = int(np.prod(shape))
    while True:
        once = rng.permutation(spec.n_letters)[:places]
        again = rng.integers(0, spec.n_letters, places - len(once))
        table = rng.permutation(np.concatenate([once, again])).reshape(-1, LEAF)
        if len(np.unique(table, axis=0)) == len(table):
            return table.reshape(shape).astype(np.int64)


# -- inner rules


def _draw_inner(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Tables of the root, the second level, the concepts, the fourth and the fifth level."""
    n_fourth, n_fifth, n_sixth = RELEASED_LEVELS[3:]
    root, second = _draw_upper(rng)
    short = int(rng.integers(n_fourth))
    others = np.setdiff1d(np.arange(n_fourth), [short])
    concepts = _covering(
        lambda: _table(
            [
                [
                    rng.permutation([short] * n_short + list(rng.choice(others, size - n_short)))
                    for size, n_short in rules
                ]
                for rules in CONCEPT_RULES
            ]
        ),
        n_fourth,
    )
    sizes = [(3, 2) if symbol == short else (3, 3) for symbol in range(n_fourth)]
    fourth = _covering(
        lambda: _table([[rng.integers(0, n_fifth, size) for size in pair] for pair in sizes]),
        n_fifth,
    )
    fifth = _covering(
        lambda: _table([[rng.integers(0, n_sixth, 3) for _ in range(2)] for _ in range(n_fifth)]),
        n_sixth,
    )
    return root, second, concepts, fourth, fifth


def _draw_upper(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tables of the root and of the second level, drawn until samples have the released lengths:
    261 letters at least, 391 to 395 in the mean.
    """
    _, n_second, n_concepts = RELEASED_LEVELS[:3]
    while True:
        a, b, c = rng.permutation(n_second)
        root = _table([[(a, b), (b, c)]])
        rules = [
            [rng.choice(n_concepts, size, replace=False) for size in SECOND_RULES]
            for _ in range(n_second)
        ]
        mean = [np.mean([CONCEPT_MEANS[rule].sum() for rule in symbol]) for symbol in rules]
        least = [min(CONCEPT_LEAST[rule].sum() for rule in symbol) for symbol in rules]
        used = {int(concept) for symbol in rules for rule in symbol for concept in rule}
        distinct = all(sorted(symbol[1]) != sorted(symbol[2]) for symbol in rules)
        expected = (mean[a] + mean[c]) / 2 + mean[b]
        shortest = least[b] + min(least[a], least[c])
        if (
            MEAN[0] <= expected <= MEAN[1]
            and shortest == SHORTEST
            and len(used) == n_concepts
            and distinct
        ):
            return root, _table(rules)


def _table(rules: Iterable[Iterable[Iterable[int]]]) -> np.ndarray:
    """A rule table of three places, padded with -1, from lists of children."""
    return np.array(
        [[(list(rule) + [PAD] * LEAF)[:LEAF] for rule in symbol] for symbol in rules],
        dtype=np.int64,
    )


def _covering(draw: Callable[[], np.ndarray], n_children: int) -> np.ndarray:
    """Draw tables until one uses every child and gives no symbol the same rule twice."""
    while True:
        table = draw()
        used = set(table[table != PAD].tolist())
        if len(used) == n_children and all(
            len(np.unique(symbol, axis=0)) == len(symbol) for symbol in table
        ):
            return table


# -- branches

Part = tuple[int, tuple[int, ...]]  # a concept and its fourth-level symbols
Start = tuple[float, list[Part]]  # with its weight


def _branch(starts: list[Start], fourth: np.ndarray, fifth: np.ndarray) -> Branch:
    """A branch of weighted sequences of parts."""
    width = max(sum(len(symbols) for _, symbols in parts) for _, parts in starts)
    columns: tuple[list[list[int]], ...] = ([], [], [])
    for _, parts in starts:
        rows = (
            [symbol for _, symbols in parts for symbol in symbols],
            [concept for concept, symbols in parts for _ in symbols],
            [number for number, (_, symbols) in enumerate(parts) for _ in symbols],
        )
        for column, row in zip(columns, rows, strict=True):
            column.append(row + [PAD] * (width - len(row)))
    weights = np.array([weight for weight, _ in starts])
    arrays = [np.array(column, dtype=np.int64) for column in columns]
    return Branch(arrays[0], arrays[1], arrays[2], weights / weights.sum(), fourth, fifth)


def _rules_of(table: np.ndarray, symbol: int) -> list[tuple[int, ...]]:
    return [tuple(int(c) for c in rule if c != PAD) for rule in table[symbol] if rule[0] != PAD]


def _expand(weight: float, concepts: Iterable[int], table: np.ndarray) -> list[Start]:
    """All starts of a sequence of concepts, every rule of a concept equally likely."""
    options = [[(concept, rule) for rule in _rules_of(table, concept)] for concept in concepts]
    choices = list(product(*options))
    return [(weight / len(choices), list(parts)) for parts in choices]


def _full_branch(inner: tuple[np.ndarray, ...]) -> Branch:
    root, second, concepts, fourth, fifth = inner
    starts = []
    for pair in _rules_of(root, 0):
        for rules in product(*(_rules_of(second, symbol) for symbol in pair)):
            starts += _expand(1.0, sum(rules, ()), concepts)
    return _branch(starts, fourth, fifth)


def _safety_branches(
    inner: tuple[np.ndarray, ...], rng: np.random.Generator
) -> dict[BranchName, Branch]:
    _, _, concepts, fourth, fifth = inner
    first, middle, last = range(N_SAFE, len(CONCEPT_RULES))
    # One child of every rule is left out: texts of unsafe branches are sparser.
    n_symbols, n_rules, _ = fifth.shape
    kept = np.stack([rng.permutation(LEAF) for _ in range(n_symbols * n_rules)])[:, :2]
    thin = np.take_along_axis(fifth, np.sort(kept).reshape(n_symbols, n_rules, 2), 2)

    safe_order = (0, 2, 1)  # the concepts in the order of SAFE_SHARES
    safe = [
        start
        for concept, share in zip(safe_order, SAFE_SHARES, strict=True)
        for start in _expand(share, [concept], concepts)
    ]
    unsafe = [
        *_expand(4 / 6, [middle], concepts),
        *_expand(1 / 6, [first, last], concepts),
        *_expand(1 / 6, [first, last, middle], concepts),
    ]
    ends: list[list[Part]] = [
        [(c, (s,)) for c in members for rule in _rules_of(concepts, c) for s in rule]
        for members in (range(N_SAFE), range(N_SAFE, len(CONCEPT_RULES)))
    ]
    intermediate: list[Start] = [
        (1.0, list(parts)) for one, two in product(*ends) for parts in ((one, two), (two, one))
    ]
    # The rules with a short symbol, and without: see CONCEPT_RULES.
    with_short, without = _rules_of(concepts, last)
    short = _short_symbol(fourth)
    plain = [symbol for symbol in with_short if symbol != short]
    id_mg: list[Start] = [
        *_expand(0.7, [middle], concepts),
        (0.2, [(first, _rules_of(concepts, first)[1])]),
        (0.1, [(last, tuple(plain))]),
    ]
    ood_mg: list[Start] = [(0.5, [(last, (plain[0], short))]), (0.5, [(last, without)])]
    long_only = fourth.copy()
    long_only[short, 1] = PAD
    return {
        "safe": _branch(safe, fourth, fifth),
        "unsafe": _branch(unsafe, fourth, thin),
        "intermediate": _branch(intermediate, fourth, fifth),
        "id_mg": _branch(id_mg, fourth, thin),
        "ood_mg": _branch(ood_mg, long_only, thin),
    }


def _short_symbol(fourth: np.ndarray) -> int:
    """The fourth-level symbol whose second rule has two children."""
    return int(np.nonzero((fourth == PAD).any(axis=(1, 2)))[0][0])
