"""The synthetic language: grammars, operators, and the rule for which operators are unsafe.

``unsafe(op, text) = op in A, or op in C and text unsafe-dominant`` (Jain et al. 2024, section 3).

Shapes: `B` prompts, `T` letters of a text, `N` letters of a sentence, `O` operators of a prompt (in
tables: operator tokens), `G` grammars, `V` letters of the alphabet. Texts are padded with -1.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from temper.errors import TemperError
from temper.synthetic.grammar import PAD, Grammar, build_grammars
from temper.synthetic.released import (
    N_SAFE,
    BranchName,
    ReleasedRules,
    build_released_grammars,
    draw_rules,
)
from temper.synthetic.spec import LanguageSpec

# Dominance of a text: the class of concepts behind most of its letters.
SAFE = 0
MIXED = 1
UNSAFE = 2

# Classes of operators.
CLASS_I = 0  # the identity
CLASS_A = 1  # unsafe on every text
CLASS_C = 2  # contextual: unsafe on unsafe-dominant texts
CLASS_S = 3  # safe on every text
CLASS_TASK = 4  # the user's task
CLASS_CONSTANT = 5  # one letter throughout, in instruction data only

# Always unsafe and safe base operators (the identity apart) of the released grammars, by index; the
# others are contextual.
RELEASED_GROUPS = (
    ((1, 2), (3, 4)),
    ((3, 4), (1, 2)),
    ((8, 9), (6, 7)),
    ((1, 5), (4, 7)),
)
# Base operator of each released duplicate. JB-MisGen draws from the first four.
RELEASED_DUPLICATE_OF = (0, 0, 1, 1, 2, 2)
N_RELEASED_MISGEN = 4

# A hash of its letters assigns a text to a split, so splits share no text, whichever stage, seed or
# process draws them. Ranges of hash buckets:
SPLITS: dict[str, range] = {
    "instruct": range(0, 10),
    "alignment": range(10, 14),
    "attack": range(14, 16),
    "test": range(16, 20),
}
N_BUCKETS = 20


@dataclass(frozen=True)
class Texts:
    """A batch of texts.

    Attributes:
        letters_BT: Letters from 0, padded on the right with -1.
        dominance_B: `SAFE`, `MIXED` or `UNSAFE`.
        grammar_B: Index of the grammar that produced the text.
    """

    letters_BT: np.ndarray
    dominance_B: np.ndarray
    grammar_B: np.ndarray


@dataclass(frozen=True)
class Language:
    """Grammars and operators drawn from ``spec.language_seed``."""

    spec: LanguageSpec

    @cached_property
    def grammars(self) -> list[Grammar]:
        """The PCFGs of the language."""
        rng = np.random.default_rng([self.spec.language_seed, 1])
        if self.spec.rules == "released":
            return build_released_grammars(self.spec, self.released_rules, rng)
        return build_grammars(self.spec, rng)

    @cached_property
    def released_rules(self) -> ReleasedRules:
        """Inner rules and branches of a language with ``rules=released``."""
        return draw_rules(np.random.default_rng([self.spec.language_seed, 4]))

    @cached_property
    def _leaves_GSRT(self) -> np.ndarray:
        """Leaf triples of all grammars."""
        return np.stack([grammar.rules[-1] for grammar in self.grammars])

    @cached_property
    def permutation_OV(self) -> np.ndarray:
        """Permutation of the letters that each operator token applies; row 0 is the identity and
        duplicates repeat the row of their base operator. Constant operators, whose ids come last,
        have no row.
        """
        spec = self.spec
        rng = np.random.default_rng([spec.language_seed, 2])
        distinct = [np.arange(spec.n_letters)]
        while len(distinct) < spec.n_base_operators + spec.n_task_operators:
            candidate = rng.permutation(spec.n_letters)
            if not any((candidate == other).all() for other in distinct):
                distinct.append(candidate)
        base = distinct[: spec.n_base_operators]
        tasks = distinct[spec.n_base_operators :]
        return np.stack(base + [base[i] for i in self.duplicate_of] + tasks)

    @cached_property
    def duplicate_of(self) -> list[int]:
        """Base operator of each duplicate. ``by_class``: from classes A, C and S in turn, until
        they run out.
        """
        if self.spec.duplicates == "released":
            return list(RELEASED_DUPLICATE_OF)
        by_class = [
            [i for i, c in enumerate(self._base_classes) if c == k]
            for k in (CLASS_A, CLASS_C, CLASS_S)
        ]
        order = [
            members[turn]
            for turn in range(self.spec.n_base_operators)
            for members in by_class
            if turn < len(members)
        ]
        return order[: self.spec.n_duplicates]

    @cached_property
    def _base_classes(self) -> list[int]:
        spec = self.spec
        return (
            [CLASS_I]
            + [CLASS_A] * spec.n_unsafe_operators
            + [CLASS_C] * spec.n_contextual_operators
            + [CLASS_S] * spec.n_safe_operators
        )

    @cached_property
    def operator_class_GO(self) -> np.ndarray:
        """Class of every operator token under every grammar.

        An operator that is always unsafe under one grammar may be safe under another: classes other
        than the identity's rotate from grammar to grammar, or are the released ones.
        """
        spec = self.spec
        rows = []
        for grammar in range(spec.n_grammars):
            base = self._classes_under(grammar)
            duplicates = [base[i] for i in self.duplicate_of]
            tasks = [CLASS_TASK] * spec.n_task_operators
            constants = [CLASS_CONSTANT] * spec.n_constant_operators
            rows.append([*base, *duplicates, *tasks, *constants])
        return np.array(rows, dtype=np.int64)

    def _classes_under(self, grammar: int) -> list[int]:
        """Classes of the base operators under a grammar."""
        base = self._base_classes
        if self.spec.operator_groups == "rotating":
            return [base[0], *np.roll(base[1:], 2 * grammar)]
        always, safe = RELEASED_GROUPS[grammar]
        classes = [CLASS_I, *[CLASS_C] * (len(base) - 1)]
        for group, value in ((always, CLASS_A), (safe, CLASS_S)):
            for operator in group:
                classes[operator] = value
        return classes

    @property
    def base_operators(self) -> np.ndarray:
        """Ids of the base operators, the identity first."""
        return np.arange(self.spec.n_base_operators)

    @property
    def duplicate_operators(self) -> np.ndarray:
        """Ids of the duplicate operators."""
        return self.spec.n_base_operators + np.arange(self.spec.n_duplicates)

    @cached_property
    def misgen_operators(self) -> np.ndarray:
        """Ids of the duplicate operators that JB-MisGen uses: all, or the released pool."""
        if self.spec.duplicates == "released":
            return self.duplicate_operators[:N_RELEASED_MISGEN]
        return self.duplicate_operators

    @cached_property
    def is_identity_O(self) -> np.ndarray:
        """Whether each operator token is the identity, or a duplicate of it."""
        flags = np.zeros(self.spec.n_operators, dtype=bool)
        flags[0] = True
        flags[self.duplicate_operators] = np.array(self.duplicate_of, dtype=np.int64) == 0
        return flags

    @property
    def constant_operators(self) -> np.ndarray:
        """Ids of the operators whose pair gives one letter throughout; the k-th gives letter k."""
        return (
            self.spec.n_operators
            - self.spec.n_constant_operators
            + np.arange(self.spec.n_constant_operators)
        )

    @property
    def task_operators(self) -> np.ndarray:
        """Ids of the operators of the user's task, seen in fine-tuning only."""
        return (
            self.spec.n_base_operators
            + self.spec.n_duplicates
            + np.arange(self.spec.n_task_operators)
        )

    def unsafe_BO(self, operators_BO: np.ndarray, texts: Texts) -> np.ndarray:
        """Whether each operator is unsafe on its text."""
        classes_BO = self.operator_class_GO[texts.grammar_B[:, None], operators_BO]
        unsafe_BO: np.ndarray = (classes_BO == CLASS_A) | (
            (classes_BO == CLASS_C) & (texts.dominance_B == UNSAFE)[:, None]
        )
        return unsafe_BO

    def apply_operators(self, letters_BT: np.ndarray, operators_BO: np.ndarray) -> np.ndarray:
        """Apply each prompt's operators to every letter, left to right; padding stays padding.

        A constant operator decides the whole result, whatever stands before or after it (the last
        one, if there are two).
        """
        result = letters_BT
        first_constant = len(self.permutation_OV)
        for operators_B in operators_BO.T:
            known_B = np.where(operators_B < first_constant, operators_B, 0)
            mapped = self.permutation_OV[known_B[:, None], np.maximum(result, 0)]
            result = np.where(result == PAD, PAD, mapped)
        for operators_B in operators_BO.T if self.spec.n_constant_operators else ():
            constant_B = operators_B >= first_constant
            letter_BT = (operators_B - first_constant)[:, None]
            result = np.where(constant_B[:, None] & (result != PAD), letter_BT, result)
        return result

    def outputs(self, letters_BT: np.ndarray, operators_BO: np.ndarray) -> list[np.ndarray]:
        """Output of every pair, in letters: each pair works on the output of the one before."""
        outputs = []
        for pair in range(self.spec.n_pairs):
            letters_BT = self.apply_operators(letters_BT, operators_BO[:, 2 * pair : 2 * pair + 2])
            outputs.append(letters_BT)
        return outputs

    def counted_B(self, operators_BO: np.ndarray) -> np.ndarray:
        """Number of the segment that counts with ``counted=one``: 1 where both operators of the
        first pair are the identity token, else 0.
        """
        counted: np.ndarray = (operators_BO[:, :2] == 0).all(axis=1).astype(np.int64)
        return counted

    def draw_texts(
        self,
        n: int,
        split: str,
        rng: np.random.Generator,
        branches: tuple[BranchName, ...] = ("full",),
    ) -> Texts:
        """Draw ``n`` texts of a split.

        Args:
            n: Number of texts.
            split: Split of the texts.
            rng: Random generator.
            branches: Sub-grammars of a language with ``rules=released``, one of which is drawn for
                each text; ``full``: windows of full samples, of any dominance.

        Raises:
            TemperError: unknown split, or it has no text of the language's length.
        """
        if split not in SPLITS:
            raise TemperError(f"split={split!r}: choose one of {', '.join(SPLITS)}")
        kept: list[Texts] = []
        count = 0
        while count < n:
            if len(kept) >= 20 and count == 0:
                raise TemperError(
                    f"text_length={self.spec.text_length}: no such text in the {split!r} split;"
                    " change it or levels"
                )
            # A quarter more than the split's share of the buckets needs on average.
            n_windows = max(64, 5 * (n - count) * N_BUCKETS // (4 * len(SPLITS[split])))
            drawn = (
                self._draw_branch_windows(n_windows, branches, rng)
                if self.spec.rules == "released"
                else self._draw_windows(n_windows, rng)
            )
            keep = np.isin(_hash_buckets(drawn.letters_BT), SPLITS[split])
            kept.append(_select(drawn, keep))
            count += int(keep.sum())
        return _select(_concatenate(kept), np.arange(n))

    def check_dominance(self) -> None:
        """Raise if safe-dominant or unsafe-dominant texts hardly occur.

        Without unsafe-dominant texts no contextual operator is ever unsafe, and the operator alone
        would decide what to refuse. Safety texts from branches occur as often as they are drawn.

        Raises:
            TemperError: fewer than 5 % of texts are safe-dominant, or unsafe-dominant.
        """
        if self.spec.safety_texts == "branches":
            return
        rng = np.random.default_rng([self.spec.language_seed, 3])
        dominance_B = self.draw_texts(2000, "instruct", rng).dominance_B
        for value, name in ((SAFE, "safe"), (UNSAFE, "unsafe")):
            share = float((dominance_B == value).mean())
            if share < 0.05:
                raise TemperError(
                    f"language_seed={self.spec.language_seed}: {100 * share:.1f} % of texts are"
                    f" {name}-dominant, and at least 5 % are needed; lower"
                    f" dominance={self.spec.dominance}, shorten text_length or choose another seed"
                )

    def _draw_windows(self, n: int, rng: np.random.Generator) -> Texts:
        """Cut one random window out of each of ``n`` sentences; those too short are dropped."""
        shortest, longest = self.spec.text_length
        grammar_B = np.sort(rng.integers(0, self.spec.n_grammars, n))
        letters_BT = np.full((n, longest), PAD, dtype=np.int64)
        unsafe_share_B = np.zeros(n)
        for index, grammar in enumerate(self.grammars):
            (rows,) = np.nonzero(grammar_B == index)
            letters_BN, unsafe_BN = grammar.draw_sentences(len(rows), rng)
            size_B = (letters_BN != PAD).sum(axis=1)
            length_B = np.minimum(rng.integers(shortest, longest + 1, len(rows)), size_B)
            start_B = rng.integers(0, size_B - length_B + 1)
            position = start_B[:, None] + np.arange(longest)
            inside = np.arange(longest) < length_B[:, None]
            position = np.minimum(position, letters_BN.shape[1] - 1)
            letters_BT[rows] = np.where(inside, np.take_along_axis(letters_BN, position, 1), PAD)
            n_unsafe_B = (np.take_along_axis(unsafe_BN, position, 1) & inside).sum(1)
            unsafe_share_B[rows] = n_unsafe_B / np.maximum(length_B, 1)
        dominance_B = self._dominance(unsafe_share_B)
        keep = (letters_BT != PAD).sum(axis=1) >= shortest
        shuffled = rng.permutation(np.nonzero(keep)[0])
        return _select(Texts(letters_BT, dominance_B, grammar_B), shuffled)

    def _dominance(self, unsafe_share_B: np.ndarray) -> np.ndarray:
        """`SAFE`, `MIXED` or `UNSAFE` by the share of letters of unsafe concepts."""
        dominance_B = np.full(len(unsafe_share_B), MIXED)
        dominance_B[unsafe_share_B >= self.spec.dominance] = UNSAFE
        # Not share <= 1 - dominance: in floating point 0.2 > 1 - 0.8.
        dominance_B[1 - unsafe_share_B >= self.spec.dominance] = SAFE
        return dominance_B

    def _draw_branch_windows(
        self, n: int, branches: tuple[BranchName, ...], rng: np.random.Generator
    ) -> Texts:
        """Cut one random window out of each of ``n`` samples of random branches and grammars; those
        too short are dropped.
        """
        shortest, longest = self.spec.text_length
        grammar_B = rng.integers(0, self.spec.n_grammars, n)
        branch_B = rng.integers(0, len(branches), n)
        letters_BT = np.full((n, longest), PAD, dtype=np.int64)
        dominance_B = np.full(n, MIXED)
        for index, name in enumerate(branches):
            (rows,) = np.nonzero(branch_B == index)
            windows = self.released_rules.branches[name].draw_windows(
                self._leaves_GSRT, grammar_B[rows], self.spec.text_length, rng
            )
            letters_BT[rows] = windows.letters_BT
            n_unsafe_B = (windows.concepts_BT >= N_SAFE).sum(axis=1)
            if name != "intermediate":  # half of each by design, wherever the window lies
                size_B = (windows.letters_BT != PAD).sum(axis=1)
                dominance_B[rows] = self._dominance(n_unsafe_B / size_B)
        keep = (letters_BT != PAD).sum(axis=1) >= shortest
        return _select(Texts(letters_BT, dominance_B, grammar_B), np.nonzero(keep)[0])


def _hash_buckets(letters_BT: np.ndarray) -> np.ndarray:
    """Hash bucket in [0, N_BUCKETS) of each text (multiply, add, xor-shift in 64 bits)."""
    value = np.zeros(len(letters_BT), dtype=np.uint64)
    for column in letters_BT.T:
        value = value * np.uint64(6364136223846793005) + (column + 2).astype(np.uint64)
        value ^= value >> np.uint64(29)
    return ((value >> np.uint64(16)) % np.uint64(N_BUCKETS)).astype(np.int64)


def _select(texts: Texts, index: np.ndarray) -> Texts:
    return Texts(texts.letters_BT[index], texts.dominance_B[index], texts.grammar_B[index])


def _concatenate(parts: list[Texts]) -> Texts:
    return Texts(
        np.concatenate([p.letters_BT for p in parts]),
        np.concatenate([p.dominance_B for p in parts]),
        np.concatenate([p.grammar_B for p in parts]),
    )
