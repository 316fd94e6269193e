"""Prompts of each kind, drawn by the batch.

Shapes: `B` prompts, `O` operator slots, `K` operator tokens.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from temper.errors import TemperError
from temper.synthetic.language import CLASS_C, MIXED, Language, Texts


class Kind(StrEnum):
    """What a prompt asks for.

    ``instruct``: any operators, base or duplicate, on any text; ``safe`` and ``unsafe``: every
    operator but the identity is safe (unsafe) on a dominated text; ``task``: an operator of the
    user's task; the jailbreaks ``jb_co_task`` (each pair holds an unsafe and a safe operator),
    ``jb_co_text`` (contextual operators on a half-safe, half-unsafe text) and ``jb_misgen``
    (unsafe duplicates, which safety training never shows).
    """

    INSTRUCT = "instruct"
    SAFE = "safe"
    UNSAFE = "unsafe"
    TASK = "task"
    JB_CO_TASK = "jb_co_task"
    JB_CO_TEXT = "jb_co_text"
    JB_MISGEN = "jb_misgen"


@dataclass(frozen=True)
class Prompts:
    """Operators and texts of a set of prompts of one kind."""

    kind: Kind
    operators_BO: np.ndarray
    texts: Texts

    def __len__(self) -> int:
        return len(self.operators_BO)

    def __getitem__(self, index: slice | np.ndarray) -> "Prompts":
        """The prompts with these numbers, in this order."""
        texts = self.texts
        return Prompts(
            self.kind,
            self.operators_BO[index],
            Texts(texts.letters_BT[index], texts.dominance_B[index], texts.grammar_B[index]),
        )


#: Prompts, and whether the rows made of them carry them out (True) or refuse them (False).
AnsweredPrompts = tuple[Prompts, bool]


def draw_prompts(
    language: Language,
    kind: Kind,
    n: int,
    split: str,
    rng: np.random.Generator,
    avoid: Collection[bytes] = frozenset(),
) -> Prompts:
    """Draw ``n`` distinct prompts of a kind on texts of a split.

    Args:
        language: Language of the prompts.
        kind: What they ask for.
        n: How many.
        split: Split of their texts.
        rng: Source of randomness.
        avoid: Keys (see `prompt_keys`) that must not be drawn. A text can, rarely, be written by
            safe concepts as well as by unsafe ones; the same prompt must not be refused and
            answered.

    Raises:
        TemperError: the language cannot make that many different prompts of that kind.
    """
    parts: list[Prompts] = []
    seen: set[bytes] = set()
    avoided = set(avoid)
    barren_rounds = 0
    while len(seen) < n:
        batch = draw_batch(language, kind, max(64, 2 * (n - len(seen))), split, rng)
        fresh = []
        for row, key in enumerate(prompt_keys(batch)):
            if key not in seen and key not in avoided and len(seen) < n:
                seen.add(key)
                fresh.append(row)
        parts.append(batch[np.array(fresh, dtype=np.int64)])
        barren_rounds = 0 if fresh else barren_rounds + 1
        if barren_rounds == 10:
            raise TemperError(
                f"{n} distinct {kind} prompts asked of the {split!r} split, {len(seen)} found: "
                "ask for fewer, or make the language larger (text_length, n_letters, n_leaf_rules)"
            )
    if not parts:
        return draw_batch(language, kind, 1, split, rng)[:0]
    return join_prompts(parts)


def prompt_keys(prompts: Prompts) -> list[bytes]:
    """A key per prompt; prompts are equal exactly if their keys are."""
    joined = np.concatenate([prompts.operators_BO, prompts.texts.letters_BT], axis=1)
    return [row.tobytes() for row in joined]


def join_prompts(parts: Sequence[Prompts]) -> Prompts:
    """All prompts of at least one set, in order; their kind is that of the first set."""
    return Prompts(
        parts[0].kind,
        np.concatenate([p.operators_BO for p in parts]),
        Texts(
            np.concatenate([p.texts.letters_BT for p in parts]),
            np.concatenate([p.texts.dominance_B for p in parts]),
            np.concatenate([p.texts.grammar_B for p in parts]),
        ),
    )


def draw_batch(
    language: Language, kind: Kind, n: int, split: str, rng: np.random.Generator
) -> Prompts:
    """Like `draw_prompts` without the check for repeats: for endless streams, in milliseconds."""
    parts: list[Prompts] = []
    for _ in range(1000):
        texts = language.texts(n, split, rng)
        operators_BO, valid_B = _SLOTS[kind](language, texts, rng)
        parts.append(Prompts(kind, operators_BO, texts)[np.nonzero(valid_B)[0]])
        if sum(map(len, parts)) >= n:
            return join_prompts(parts)[:n]
    raise TemperError(
        f"no {kind} prompts in this language: check n_unsafe_operators, n_contextual_operators,"
        " n_duplicates and dominance"
    )


def _pick(allowed_BK: np.ndarray, n_slots: int, rng: np.random.Generator) -> np.ndarray:
    """One allowed operator token per slot, uniformly; rows with none allowed get token 0."""
    scores = rng.random((allowed_BK.shape[0], n_slots, allowed_BK.shape[1]))
    picked: np.ndarray = np.where(allowed_BK[:, None, :], scores, -1.0).argmax(axis=2)
    return picked


def _insert_identities(
    language: Language, operators_BO: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Put the identity into one slot of a pair with the spec's probability."""
    n = len(operators_BO)
    for pair in range(language.spec.n_pairs):
        hit_B = rng.random(n) < language.spec.identity_probability
        slot_B = 2 * pair + rng.integers(0, 2, n)
        operators_BO[hit_B, slot_B[hit_B]] = 0
    return operators_BO


def _allowed(language: Language, texts: Texts, tokens: np.ndarray, unsafe: bool) -> np.ndarray:
    """Mask over all operator tokens: those of ``tokens`` with the wanted safety on each text."""
    all_BK = np.broadcast_to(
        np.arange(language.spec.n_operators), (len(texts.grammar_B), language.spec.n_operators)
    )
    member = np.isin(all_BK, tokens) & (all_BK != 0)
    allowed: np.ndarray = member & (language.unsafe_BO(all_BK, texts) == unsafe)
    return allowed


Slots = Callable[
    [Language, Texts, np.random.Generator], tuple[np.ndarray, np.ndarray]
]  # operators_BO, valid_B


def _uniform_safety(tokens_of: Callable[[Language], np.ndarray], unsafe: bool) -> Slots:
    def slots(
        language: Language, texts: Texts, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        allowed = _allowed(language, texts, tokens_of(language), unsafe)
        operators = _pick(allowed, 2 * language.spec.n_pairs, rng)
        valid = allowed.any(axis=1) & (texts.dominance_B != MIXED)
        return _insert_identities(language, operators, rng), valid

    return slots


def _instruct(
    language: Language, texts: Texts, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    n, spec = len(texts.grammar_B), language.spec
    operators = rng.integers(1, spec.n_base_operators, (n, 2 * spec.n_pairs))
    if (
        spec.n_duplicates
    ):  # never composed with their originals, else JB-MisGen would be trained away
        n_base = spec.n_base_operators
        share = spec.n_duplicates / (spec.n_duplicates + n_base - 1)
        duplicates = rng.integers(n_base, n_base + spec.n_duplicates, operators.shape)
        operators = np.where(rng.random((n, 1)) < share, duplicates, operators)
    return _insert_identities(language, operators, rng), np.ones(n, dtype=bool)


def _task(
    language: Language, texts: Texts, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    n = len(texts.grammar_B)
    operators = np.zeros((n, 2 * language.spec.n_pairs), dtype=np.int64)
    for pair in range(language.spec.n_pairs):
        slot = 2 * pair + rng.integers(0, 2, n)
        operators[np.arange(n), slot] = rng.choice(language.task_operators, n)
    return operators, texts.dominance_B != MIXED


def _competing_task(
    language: Language, texts: Texts, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    base = language.base_operators
    unsafe, safe = _allowed(language, texts, base, True), _allowed(language, texts, base, False)
    n, n_pairs = len(texts.grammar_B), language.spec.n_pairs
    pairs = np.stack([_pick(unsafe, n_pairs, rng), _pick(safe, n_pairs, rng)], axis=2)
    flip = rng.random((n, n_pairs)) < 0.5
    pairs[flip] = pairs[flip][:, ::-1]
    valid = unsafe.any(1) & safe.any(1) & (texts.dominance_B != MIXED)
    return pairs.reshape(n, 2 * n_pairs), valid


def _competing_text(
    language: Language, texts: Texts, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.arange(language.spec.n_operators)
    contextual = language.operator_class_GO[texts.grammar_B] == CLASS_C
    allowed = contextual & np.isin(tokens, language.base_operators)
    operators = _insert_identities(language, _pick(allowed, 2 * language.spec.n_pairs, rng), rng)
    return operators, (texts.dominance_B == MIXED) & allowed.any(1)


_SLOTS = {
    Kind.INSTRUCT: _instruct,
    Kind.SAFE: _uniform_safety(lambda language: language.base_operators, unsafe=False),
    Kind.UNSAFE: _uniform_safety(lambda language: language.base_operators, unsafe=True),
    Kind.TASK: _task,
    Kind.JB_CO_TASK: _competing_task,
    Kind.JB_CO_TEXT: _competing_text,
    Kind.JB_MISGEN: _uniform_safety(lambda language: language.duplicate_operators, unsafe=True),
}
