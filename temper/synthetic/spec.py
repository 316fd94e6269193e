"""Sizes of the synthetic language, and its presets `tiny`, `small` and `paper`.

Source: Jain et al., "What Makes and Breaks Safety Fine-tuning? A Mechanistic Study"
(NeurIPS 2024, arXiv 2407.10264), section 3 and appendix; the sizes of `paper` are theirs.
"""

from dataclasses import dataclass, fields, replace
from itertools import count
from math import factorial

from temper.errors import TemperError


@dataclass(frozen=True)
class LanguageSpec:
    """Full definition of a synthetic language: equal specs give equal languages.

    Args:
        n_letters: Size of the alphabet.
        n_grammars: Number of PCFGs. They share inner rules and differ in their leaf triples.
        levels: Non-terminals per level, root first. The third level holds the concepts.
        n_root_rules: Productions of the root; every inner non-terminal below it has two.
        n_leaf_rules: Letter triples of each non-terminal of the last level.
        text_length: Shortest and longest text, in letters.
        n_pairs: Operator pairs per prompt: 1 gives ``t2(t1(text))``, 2 adds ``t4(t3(out1))``.
        n_unsafe_operators: Operators that are unsafe on any text (class A).
        n_contextual_operators: Operators unsafe on unsafe-dominant text only (class C).
        n_safe_operators: Operators safe on any text (class S), the identity not counted.
        n_duplicates: Operator tokens that repeat a base operator's function. Instruction training
            shows them, safety training does not (JB-MisGen).
        n_task_operators: Operators of the user's task, which no stage before fine-tuning shows.
        identity_probability: Share of operator pairs in which one of the two is the identity.
        dominance: Share of a text's letters that must come from concepts of one class for the
            text to count as dominated by it.
        language_seed: Seed of grammars and operators.
    """

    n_letters: int = 30
    n_grammars: int = 4
    levels: tuple[int, ...] = (1, 3, 6, 8, 8)
    n_root_rules: int = 5
    n_leaf_rules: int = 2
    text_length: tuple[int, int] = (25, 35)
    n_pairs: int = 2
    n_unsafe_operators: int = 2
    n_contextual_operators: int = 5
    n_safe_operators: int = 2
    n_duplicates: int = 6
    n_task_operators: int = 4
    identity_probability: float = 0.5
    dominance: float = 0.6
    language_seed: int = 0

    def __post_init__(self) -> None:
        self._check_grammar()
        self._check_operators()

    def _check_grammar(self) -> None:
        if len(self.levels) < 3 or self.levels[0] != 1 or self.levels[2] < 2:
            raise TemperError(
                f"levels={self.levels}: give at least three levels, one root first and at least "
                "two concepts at the third, such as (1, 3, 6)"
            )
        if not 1 <= self.text_length[0] <= self.text_length[1]:
            raise TemperError(
                f"text_length={self.text_length}: give (shortest, longest) with 1 <= shortest <="
                " longest"
            )
        # The alphabet needs a permutation for each operator and a triple for each leaf rule.
        n_functions = self.n_base_operators + self.n_task_operators
        n_triples = self.levels[-1] * self.n_leaf_rules
        enough = next(n for n in count(1) if factorial(n) >= n_functions and n**3 >= n_triples)
        if self.n_letters < enough:
            raise TemperError(
                f"n_letters={self.n_letters}: too few for these operators and leaf rules; give at"
                f" least {enough}"
            )
        if self.n_pairs < 1 or self.n_grammars < 1:
            raise TemperError(
                f"n_pairs={self.n_pairs}, n_grammars={self.n_grammars}: give at least 1 of each"
            )
        if not 0.5 < self.dominance <= 1.0:
            raise TemperError(f"dominance={self.dominance}: give a share in (0.5, 1]")

    def _check_operators(self) -> None:
        if not 0 <= self.identity_probability <= 1:
            raise TemperError(
                f"identity_probability={self.identity_probability}: give a share in [0, 1]"
            )
        if self.n_duplicates and self.n_duplicates > self.n_base_operators - 1:
            raise TemperError(
                f"n_duplicates={self.n_duplicates}: at most {self.n_base_operators - 1}, one for"
                " each base operator other than the identity; give fewer"
            )

    @property
    def n_base_operators(self) -> int:
        """Number of base operators, including the identity (token 0)."""
        return 1 + self.n_unsafe_operators + self.n_contextual_operators + self.n_safe_operators

    @property
    def n_operators(self) -> int:
        """Number of operator tokens: base, duplicate and task."""
        return self.n_base_operators + self.n_duplicates + self.n_task_operators

    @property
    def prompt_length(self) -> int:
        """Length of the longest prompt in tokens: BOS, operators, SOT, text, EOT."""
        return 1 + 2 * self.n_pairs + 1 + self.text_length[1] + 1

    @property
    def response_length(self) -> int:
        """Length of the longest response in tokens: (output, STOP) per pair, EOS."""
        return self.n_pairs * (self.text_length[1] + 1) + 1


PRESETS: dict[str, LanguageSpec] = {
    "tiny": LanguageSpec(
        n_letters=8,
        n_grammars=1,
        levels=(1, 2, 4),
        n_leaf_rules=4,
        text_length=(3, 5),
        n_pairs=1,
        n_unsafe_operators=2,
        n_contextual_operators=1,
        n_safe_operators=2,
        n_duplicates=2,
        n_task_operators=2,
    ),
    "small": LanguageSpec(
        n_letters=12,
        n_grammars=1,
        levels=(1, 3, 6),
        n_leaf_rules=4,
        text_length=(6, 9),
        n_pairs=1,
        n_unsafe_operators=2,
        n_contextual_operators=2,
        n_safe_operators=4,
        n_duplicates=6,
        n_task_operators=2,
        dominance=0.75,
    ),
    "paper": LanguageSpec(),
}


def language_spec(preset: str, **overrides: object) -> LanguageSpec:
    """Spec of a named preset, with some fields replaced.

    Raises:
        TemperError: unknown preset, unknown field, or invalid combination of sizes.
    """
    if preset not in PRESETS:
        raise TemperError(f"preset={preset!r}: choose one of {', '.join(PRESETS)}")
    unknown = set(overrides) - {field.name for field in fields(LanguageSpec)}
    if unknown:
        raise TemperError(
            f"language: no field {sorted(unknown)[0]!r}; fields are"
            f" {', '.join(f.name for f in fields(LanguageSpec))}"
        )
    return replace(PRESETS[preset], **overrides)  # type: ignore[arg-type]
