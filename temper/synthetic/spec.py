"""Sizes and rules of the synthetic language, and its presets `tiny`, `small` and `paper`.

Source: Jain et al., "What Makes and Breaks Safety Fine-tuning? A Mechanistic Study"
(NeurIPS 2024, arXiv 2407.10264), section 3 and appendix, and their released generator. `paper` has
its sizes and statistics; the grammar's rules are drawn by us. `small` and `tiny` simplify it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import count
from math import factorial
from typing import Literal, get_args, get_origin, get_type_hints

from temper.errors import TemperError

# What the released grammar has: non-terminals per level, rules per symbol of each level.
RELEASED_LEVELS = (1, 3, 6, 5, 5, 6)
RELEASED_RULES = {"n_root_rules": 2, "n_second_rules": 3, "n_leaf_rules": 2}
RELEASED_OPERATORS = {
    "n_unsafe_operators": 2,
    "n_contextual_operators": 5,
    "n_safe_operators": 2,
}
RELEASED_DUPLICATES = 6
RELEASED_GRAMMARS = 4


@dataclass(frozen=True)
class LanguageSpec:
    """Full definition of a synthetic language: equal specs give equal languages.

    The options with the values ``released`` (``branches``, ``letter``, ``one``) follow the released
    generator, the others are simpler and the defaults; the preset ``paper`` sets the former.

    Args:
        n_letters: Size of the alphabet.
        n_grammars: Number of PCFGs. They share inner rules and differ in their leaf triples.
        levels: Non-terminals per level, root first. The third level holds the concepts.
        n_root_rules: Productions of the root.
        n_second_rules: Productions of each symbol of the second level; inner symbols below it have
            two.
        n_leaf_rules: Letter triples of each non-terminal of the last level.
        rules: ``free``: every inner rule has two or three children, and a rule that produces
            concepts produces those of one class. ``released``: the lengths of the rules are such
            that samples have the released lengths; see `temper.synthetic.released`.
        text_length: Shortest and longest text, in letters.
        safety_texts: Texts of all prompts but those of instruction data. ``dominance``: windows of
            full samples, of which safe and unsafe prompts take those dominated by one class.
            ``branches``: windows of samples of the released sub-grammars.
        n_pairs: Operator pairs per prompt: 1 gives ``t2(t1(text))``, 2 adds ``t4(t3(out1))``.
        n_unsafe_operators: Operators that are unsafe on any text (class A).
        n_contextual_operators: Operators unsafe on unsafe-dominant text only (class C).
        n_safe_operators: Operators safe on any text (class S), the identity not counted.
        operator_groups: Classes of the base operators under each grammar. ``rotating``: those of
            the first grammar, shifted by two from one grammar to the next; they fit any numbers.
            ``released``: the released groups, by index.
        n_duplicates: Operator tokens that repeat a base operator's function. Instruction training
            shows them, safety training does not (JB-MisGen).
        duplicates: ``by_class``: one duplicate of an operator of each class A, C, S in turn, so
            that small languages have jailbreaks of each class. ``released``: two of the identity
            and two each of the operators 1 and 2.
        n_task_operators: Operators of the user's task, which no stage before fine-tuning shows.
        n_constant_operators: Operators of instruction data whose pair gives one letter throughout:
            the first of the alphabet, the second (at most 2).
        constant_share: Share of instruction prompts with one of them.
        identities: ``per_pair``: one of the two operators of a pair is the identity with
            ``identity_probability``, never both; short texts need many short compositions.
            ``released``: slots are drawn from all tokens, and in that share of the prompts one
            random slot from the identity and both duplicates of operator 2.
        identity_probability: See ``identities``.
        refusal: ``token``: a token of its own, which cannot be taken for an output. ``letter``: the
            first letter, as often as the text has letters.
        counted: ``all``: every segment of an answer is trained and judged. ``one``: in all but
            instruction data one of the two segments is: the second where both operators of the
            first pair are the identity, else the first.
        second_probability: Share of safety prompts in which the second segment counts.
        dominance: Share of a full sample's window that must come from concepts of one class for
            the text to count as dominated by it.
        window: Longest row that training may have, in tokens; None: no limit.
        language_seed: Seed of grammars and operators.

    Raises:
        TemperError: a field of a wrong type, out of range, or that does not go with another.
    """

    n_letters: int = 30
    n_grammars: int = 4
    levels: tuple[int, ...] = (1, 3, 6)
    n_root_rules: int = 5
    n_second_rules: int = 2
    n_leaf_rules: int = 2
    rules: Literal["free", "released"] = "free"
    text_length: tuple[int, int] = (25, 35)
    safety_texts: Literal["dominance", "branches"] = "dominance"
    n_pairs: int = 2
    n_unsafe_operators: int = 2
    n_contextual_operators: int = 5
    n_safe_operators: int = 2
    operator_groups: Literal["rotating", "released"] = "rotating"
    n_duplicates: int = 6
    duplicates: Literal["by_class", "released"] = "by_class"
    n_task_operators: int = 4
    n_constant_operators: int = 0
    constant_share: float = 0.0
    identities: Literal["per_pair", "released"] = "per_pair"
    identity_probability: float = 0.5
    refusal: Literal["token", "letter"] = "token"
    counted: Literal["all", "one"] = "all"
    second_probability: float = 0.0
    dominance: float = 0.6
    window: int | None = None
    language_seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        self._check_grammar()
        self._check_operators()
        self._check_released()
        self._check_answers()

    def _check_types(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal:
                if value not in get_args(hint):
                    raise TemperError(
                        f"{name}={value!r}: choose one of {', '.join(get_args(hint))}"
                    )
            elif get_origin(hint) is tuple:
                if not isinstance(value, tuple):
                    raise TemperError(f"{name}={value!r}: give a list of whole numbers")
                _check_whole(name, value, *value)
                if name == "text_length" and len(value) != 2:
                    raise TemperError(f"{name}={value!r}: give two numbers, (shortest, longest)")
            elif hint is float:
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise TemperError(f"{name}={value!r}: give a number")
            elif value is not None or name != "window":
                _check_whole(name, value, value)
        for name in COUNTS:
            if getattr(self, name) < COUNTS[name]:
                raise TemperError(f"{name}={getattr(self, name)}: give at least {COUNTS[name]}")

    def _check_grammar(self) -> None:
        if (
            len(self.levels) < 3
            or self.levels[0] != 1
            or self.levels[2] < 2
            or min(self.levels) < 1
        ):
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
        enough = max(enough, self.n_constant_operators)
        if self.n_letters < enough:
            raise TemperError(
                f"n_letters={self.n_letters}: too few for these operators and leaf rules; give at"
                f" least {enough}"
            )
        if not 0.5 < self.dominance <= 1.0:
            raise TemperError(f"dominance={self.dominance}: give a share in (0.5, 1]")

    def _check_operators(self) -> None:
        if self.n_base_operators < 2:
            raise TemperError(
                "n_unsafe_operators=0, n_contextual_operators=0, n_safe_operators=0: there is no"
                " operator besides the identity; give at least one"
            )
        for name in ("identity_probability", "constant_share", "second_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise TemperError(f"{name}={getattr(self, name)}: give a share in [0, 1]")
        if self.duplicates == "by_class" and self.n_duplicates >= max(self.n_base_operators, 1):
            raise TemperError(
                f"n_duplicates={self.n_duplicates}: at most {self.n_base_operators - 1}, one for"
                " each base operator other than the identity; give fewer"
            )
        if self.n_constant_operators > 2:
            raise TemperError(
                f"n_constant_operators={self.n_constant_operators}: at most 2 (the first letter,"
                " the second); give 0, 1 or 2"
            )
        if (self.n_constant_operators > 0) != (self.constant_share > 0):
            raise TemperError(
                f"constant_share={self.constant_share} with n_constant_operators="
                f"{self.n_constant_operators}: give both above 0, or neither"
            )

    def _check_released(self) -> None:
        """Released options need the sizes that they are defined for."""
        if self.rules == "released":
            self._require("rules", "released", {"levels": RELEASED_LEVELS, **RELEASED_RULES})
        if self.safety_texts == "branches":
            self._require("safety_texts", "branches", {"rules": "released"})
        if self.operator_groups == "released":
            self._require("operator_groups", "released", RELEASED_OPERATORS)
            if self.n_grammars > RELEASED_GRAMMARS:
                raise TemperError(
                    f"n_grammars={self.n_grammars}: operator_groups=released knows"
                    f" {RELEASED_GRAMMARS} grammars; give fewer, or operator_groups=rotating"
                )
        if self.duplicates == "released":
            self._require("duplicates", "released", {"n_duplicates": RELEASED_DUPLICATES})
            if self.n_base_operators < 3:
                raise TemperError(
                    "duplicates=released: it repeats the operators 1 and 2, and there are"
                    f" {self.n_base_operators - 1} besides the identity; give more operators, or"
                    " duplicates=by_class"
                )
        if self.identities == "released":
            self._require("identities", "released", {"duplicates": "released"})
        if self.counted == "one":
            self._require("counted", "one", {"n_pairs": 2})
        elif self.second_probability:
            self._require("second_probability", self.second_probability, {"counted": "one"})

    def _require(self, name: str, value: object, needed: Mapping[str, object]) -> None:
        for field, wanted in needed.items():
            if getattr(self, field) != wanted:
                raise TemperError(
                    f"{field}={getattr(self, field)!r}: {name}={value} needs {field}={wanted}; set"
                    f" that, or another {name}"
                )

    def _check_answers(self) -> None:
        if self.window is not None and self.longest_row > self.window:
            raise TemperError(
                f"window={self.window}: the longest row has {self.longest_row} tokens; give"
                f" window={self.longest_row}, or shorter texts than text_length={self.text_length}"
            )

    @property
    def n_base_operators(self) -> int:
        """Number of base operators, including the identity (token 0)."""
        return 1 + self.n_unsafe_operators + self.n_contextual_operators + self.n_safe_operators

    @property
    def n_operators(self) -> int:
        """Number of operator tokens: base, duplicate, task and constant."""
        return (
            self.n_base_operators
            + self.n_duplicates
            + self.n_task_operators
            + self.n_constant_operators
        )

    @property
    def prompt_length(self) -> int:
        """Length of the longest prompt in tokens: BOS, operators, SOT, text, EOT."""
        return 1 + 2 * self.n_pairs + 1 + self.text_length[1] + 1

    @property
    def response_length(self) -> int:
        """Length of the longest response in tokens: (output, STOP) per pair, EOS."""
        return self.n_pairs * (self.text_length[1] + 1) + 1

    @property
    def longest_row(self) -> int:
        """Length of the longest training row in tokens: one of DeRTa's, a prompt with a harmful
        answer that breaks off before its end for a refusal.
        """
        refusal = 2 if self.refusal == "token" else self.text_length[1] + 2
        return self.prompt_length + self.response_length - 1 + refusal


# Fields with a least value, and the value.
COUNTS = {
    "n_letters": 1,
    "n_grammars": 1,
    "n_root_rules": 1,
    "n_second_rules": 1,
    "n_leaf_rules": 1,
    "n_pairs": 1,
    "n_unsafe_operators": 0,
    "n_contextual_operators": 0,
    "n_safe_operators": 0,
    "n_duplicates": 0,
    "n_task_operators": 0,
    "n_constant_operators": 0,
    "language_seed": 0,
}


def _check_whole(name: str, value: object, *numbers: object) -> None:
    """Raise unless all ``numbers`` are whole; ``value`` is what the error shows."""
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in numbers):
        what = "whole numbers" if isinstance(value, tuple) else "a whole number"
        raise TemperError(f"{name}={value!r}: give {what}")


# `tiny` and `small` have the simpler value of every option, for the reasons given there, and one
# pair, one grammar and short texts, so that small networks learn them within a minute on a CPU.
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
    "paper": LanguageSpec(
        levels=RELEASED_LEVELS,
        n_root_rules=2,
        n_second_rules=3,
        rules="released",
        safety_texts="branches",
        operator_groups="released",
        duplicates="released",
        n_constant_operators=2,
        constant_share=0.01,
        identities="released",
        refusal="letter",
        counted="one",
        second_probability=0.2,
        window=160,
    ),
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
