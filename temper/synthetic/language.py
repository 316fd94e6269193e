"""A language: grammars, operators, and which operator is unsafe on which text.

``unsafe(op, text) = op in A, or op in C and text unsafe-dominant`` (Jain et al. 2024, section 3).

Shapes: `B` prompts, `T` letters of a text, `O` operators of a prompt. Texts are padded with -1.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from temper.errors import TemperError
from temper.synthetic.grammar import PAD, Grammar, build_grammars
from temper.synthetic.spec import LanguageSpec

SAFE, MIXED, UNSAFE = 0, 1, 2  # dominance of a text
CLASS_I, CLASS_A, CLASS_C, CLASS_S, CLASS_TASK = (
    0,
    1,
    2,
    3,
    4,
)  # identity, always, contextual, safe, task

# Texts belong to a split by a hash of their letters, so that no two splits share a text, whichever
# stage, seed or process draws them.
SPLITS: dict[str, range] = {
    "instruct": range(0, 10),
    "alignment": range(10, 14),
    "attack": range(14, 16),
    "test": range(16, 20),
}
N_BUCKETS = 20


@dataclass(frozen=True)
class Texts:
    """Drawn texts: letters_BT (padded with -1), dominance_B and grammar_B."""

    letters_BT: np.ndarray
    dominance_B: np.ndarray
    grammar_B: np.ndarray


@dataclass(frozen=True)
class Language:
    """Grammars and operators drawn from ``spec.language_seed``."""

    spec: LanguageSpec

    @cached_property
    def grammars(self) -> list[Grammar]:
        """The PCFGs."""
        return build_grammars(self.spec, np.random.default_rng([self.spec.language_seed, 1]))

    @cached_property
    def permutation_OV(self) -> np.ndarray:
        """Letter map of every operator token; row 0 is the identity, duplicates repeat a row."""
        spec, rng = self.spec, np.random.default_rng([self.spec.language_seed, 2])
        fresh = [np.arange(spec.n_letters)]
        while len(fresh) < spec.n_base_operators + spec.n_task_operators:
            candidate = rng.permutation(spec.n_letters)
            if not any((candidate == other).all() for other in fresh):
                fresh.append(candidate)
        base, tasks = fresh[: spec.n_base_operators], fresh[spec.n_base_operators :]
        return np.stack(base + [base[i] for i in self.duplicate_of] + tasks)

    @cached_property
    def duplicate_of(self) -> list[int]:
        """Base operator behind each duplicate: classes A, C and S in turn, as far as they go."""
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

        The non-identity classes rotate from grammar to grammar, so an operator that is always
        unsafe under one grammar may be safe under another.
        """
        base = self._base_classes
        rows = []
        for grammar in range(self.spec.n_grammars):
            rotated = [base[0], *np.roll(base[1:], 2 * grammar)]
            duplicates = [rotated[i] for i in self.duplicate_of]
            rows.append([*rotated, *duplicates, *[CLASS_TASK] * self.spec.n_task_operators])
        return np.array(rows, dtype=np.int64)

    @property
    def base_operators(self) -> np.ndarray:
        """Ids of the base operators, the identity first."""
        return np.arange(self.spec.n_base_operators)

    @property
    def duplicate_operators(self) -> np.ndarray:
        """Ids of the duplicate operators."""
        return self.spec.n_base_operators + np.arange(self.spec.n_duplicates)

    @property
    def task_operators(self) -> np.ndarray:
        """Ids of the operators of the user's task."""
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

    def apply(self, letters_BT: np.ndarray, operators_BO: np.ndarray) -> np.ndarray:
        """Apply operators left to right to every letter; padding stays padding."""
        result = letters_BT
        for operators_B in operators_BO.T:
            mapped = self.permutation_OV[operators_B[:, None], np.maximum(result, 0)]
            result = np.where(result == PAD, PAD, mapped)
        return result

    def texts(self, n: int, split: str, rng: np.random.Generator) -> Texts:
        """Draw ``n`` texts of a split: windows of sentences, safe, mixed or unsafe as they fall.

        Raises:
            TemperError: unknown split, or the language has no text of that length in it.
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
            drawn = self._windows(
                max(64, 5 * (n - count) * N_BUCKETS // (4 * len(SPLITS[split]))), rng
            )
            bucket_B = _bucket(drawn.letters_BT, self.spec.n_letters)
            keep = np.isin(bucket_B, SPLITS[split])
            kept.append(_rows(drawn, keep))
            count += int(keep.sum())
        return _rows(_concatenate(kept), np.arange(n))

    def check(self) -> None:
        """Refuse a language in which a class of texts hardly occurs.

        Without unsafe-dominant texts no contextual operator is ever unsafe, and the operator alone
        would decide what to refuse.

        Raises:
            TemperError: fewer than 5 % of texts are safe- or unsafe-dominant.
        """
        dominance_B = self.texts(
            2000, "instruct", np.random.default_rng([self.spec.language_seed, 3])
        ).dominance_B
        for value, name in ((SAFE, "safe"), (UNSAFE, "unsafe")):
            share = float((dominance_B == value).mean())
            if share < 0.05:
                raise TemperError(
                    f"language_seed={self.spec.language_seed}: {100 * share:.1f} % of texts are"
                    f" {name}-dominant, and at least 5 % are needed; lower"
                    f" dominance={self.spec.dominance}, shorten text_length or choose another seed"
                )

    def _windows(self, n: int, rng: np.random.Generator) -> Texts:
        shortest, longest = self.spec.text_length
        grammar_B = np.sort(rng.integers(0, self.spec.n_grammars, n))
        letters_BT = np.full((n, longest), PAD, dtype=np.int64)
        share_B = np.zeros(n)
        for index, grammar in enumerate(self.grammars):
            (rows,) = np.nonzero(grammar_B == index)
            letters_BN, unsafe_BN = grammar.sentences(len(rows), rng)
            size_B = (letters_BN != PAD).sum(axis=1)
            length_B = np.minimum(rng.integers(shortest, longest + 1, len(rows)), size_B)
            start_B = rng.integers(0, size_B - length_B + 1)
            position = start_B[:, None] + np.arange(longest)
            inside = np.arange(longest) < length_B[:, None]
            position = np.minimum(position, letters_BN.shape[1] - 1)
            letters_BT[rows] = np.where(inside, np.take_along_axis(letters_BN, position, 1), PAD)
            share_B[rows] = (np.take_along_axis(unsafe_BN, position, 1) & inside).sum(
                1
            ) / np.maximum(length_B, 1)
        dominance_B = np.full(n, MIXED)
        dominance_B[share_B >= self.spec.dominance] = UNSAFE
        dominance_B[1 - share_B >= self.spec.dominance] = (
            SAFE  # not share <= 1 - dominance: 0.2 > 1 - 0.8 in floats
        )
        keep = (letters_BT != PAD).sum(axis=1) >= shortest
        shuffled = rng.permutation(np.nonzero(keep)[0])
        return _rows(Texts(letters_BT, dominance_B, grammar_B), shuffled)


def _bucket(letters_BT: np.ndarray, n_letters: int) -> np.ndarray:
    """A hash in [0, N_BUCKETS) of each text (multiply, add, xor-shift in 64 bits)."""
    value = np.zeros(len(letters_BT), dtype=np.uint64)
    for column in letters_BT.T:
        value = value * np.uint64(6364136223846793005) + (column + 2).astype(np.uint64)
        value ^= value >> np.uint64(29)
    return ((value >> np.uint64(16)) % np.uint64(N_BUCKETS)).astype(np.int64)


def _rows(texts: Texts, index: np.ndarray) -> Texts:
    return Texts(texts.letters_BT[index], texts.dominance_B[index], texts.grammar_B[index])


def _concatenate(parts: list[Texts]) -> Texts:
    return Texts(
        np.concatenate([p.letters_BT for p in parts]),
        np.concatenate([p.dominance_B for p in parts]),
        np.concatenate([p.grammar_B for p in parts]),
    )
