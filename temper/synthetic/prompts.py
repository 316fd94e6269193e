"""Prompts of the synthetic language: random texts with operators of a given safety.

Shapes: `B` prompts, `O` operator slots of a prompt, `K` all operator tokens.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from temper.errors import TemperError
from temper.synthetic.grammar import PAD
from temper.synthetic.language import CLASS_C, MIXED, Language, Texts
from temper.synthetic.released import BranchName


class Kind(StrEnum):
    """Kinds of prompts (jailbreaks after Jain et al. 2024).

    ``instruct``: any base or duplicate operators on any text. ``safe``, ``unsafe``: every operator
    other than the identity is safe (unsafe), the text safe- or unsafe-dominant. ``task``: an
    operator of the user's task. ``jb_co_task``: competing tasks, a safe and an unsafe operator in
    each pair. ``jb_co_text``: competing text, contextual operators on a mixed text. ``jb_misgen``:
    mismatched generalisation, unsafe duplicates that safety training never shows.
    ``jb_misgen_text``: the same with texts, unsafe ones of the held-out sub-grammar; needs
    ``safety_texts=branches``.
    """

    INSTRUCT = "instruct"
    SAFE = "safe"
    UNSAFE = "unsafe"
    TASK = "task"
    JB_CO_TASK = "jb_co_task"
    JB_CO_TEXT = "jb_co_text"
    JB_MISGEN = "jb_misgen"
    JB_MISGEN_TEXT = "jb_misgen_text"


# Branches of the texts of each kind with ``safety_texts=branches``: for training, for evaluation.
TRAINED: tuple[BranchName, ...] = ("safe", "id_mg")
TESTED: tuple[BranchName, ...] = ("safe", "unsafe")
BRANCHES_OF: dict[Kind, tuple[tuple[BranchName, ...], tuple[BranchName, ...]]] = {
    Kind.INSTRUCT: (("full",), ("full",)),
    Kind.SAFE: (TRAINED, TESTED),
    Kind.UNSAFE: (TRAINED, TESTED),
    Kind.TASK: (TRAINED, TESTED),
    Kind.JB_CO_TASK: (TRAINED, TESTED),
    Kind.JB_CO_TEXT: (("intermediate",), ("intermediate",)),
    Kind.JB_MISGEN: (("id_mg",), ("id_mg",)),
    Kind.JB_MISGEN_TEXT: (("ood_mg",), ("ood_mg",)),
}


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts of one kind: operators (tokens from 0) and texts."""

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
        kind: Kind of the prompts.
        n: Number of prompts.
        split: Split of their texts.
        rng: Random generator.
        avoid: Keys (see `prompt_keys`) of prompts that must not be drawn. Rarely, safe and unsafe
            concepts produce the same text; the same prompt must not be both refused and answered.

    Raises:
        TemperError: the language has fewer distinct prompts of that kind.
    """
    batches: list[Prompts] = []
    seen: set[bytes] = set()
    avoided = set(avoid)
    rounds_without_new = 0
    while len(seen) < n:
        batch = draw_batch(language, kind, max(64, 2 * (n - len(seen))), split, rng)
        fresh = []
        for row, key in enumerate(prompt_keys(batch)):
            if key not in seen and key not in avoided and len(seen) < n:
                seen.add(key)
                fresh.append(row)
        batches.append(batch[np.array(fresh, dtype=np.int64)])
        rounds_without_new = 0 if fresh else rounds_without_new + 1
        if rounds_without_new == 10:
            raise TemperError(
                f"data: {n} distinct {kind} prompts needed from the {split!r} split, {len(seen)}"
                " found: lower the number of rows (data.n_alignment, data.n_rows, data.n_eval,"
                " ...), or choose a larger language (data.preset, or data.language.text_length,"
                " n_letters, n_leaf_rules)"
            )
    if not batches:
        return draw_batch(language, kind, 1, split, rng)[:0]
    return join_prompts(batches)


def prompt_keys(prompts: Prompts) -> list[bytes]:
    """One key per prompt; two prompts are equal if and only if their keys are."""
    joined = np.concatenate([prompts.operators_BO, prompts.texts.letters_BT], axis=1)
    return [row.tobytes() for row in joined]


def join_prompts(batches: Sequence[Prompts]) -> Prompts:
    """All prompts of at least one set, in order; their kind is that of the first set."""
    return Prompts(
        batches[0].kind,
        np.concatenate([p.operators_BO for p in batches]),
        Texts(
            np.concatenate([p.texts.letters_BT for p in batches]),
            np.concatenate([p.texts.dominance_B for p in batches]),
            np.concatenate([p.texts.grammar_B for p in batches]),
        ),
    )


def draw_batch(
    language: Language, kind: Kind, n: int, split: str, rng: np.random.Generator
) -> Prompts:
    """Draw ``n`` prompts that may repeat: faster than `draw_prompts`, for endless streams.

    Raises:
        TemperError: the language has no prompts of that kind.
    """
    if kind == Kind.TASK and not language.spec.n_task_operators:
        raise TemperError(f"no {kind} prompts in this language: n_task_operators=0; give some")
    if kind == Kind.JB_MISGEN_TEXT and language.spec.safety_texts != "branches":
        raise TemperError(
            f"{kind} prompts need the held-out sub-grammar: set data.preset=paper (data.language."
            f"safety_texts=branches), not safety_texts={language.spec.safety_texts}"
        )
    batches: list[Prompts] = []
    for _ in range(1000):
        texts = _draw_texts(language, kind, n, split, rng)
        operators_BO, valid_B = _DRAW_OPERATORS[kind](language, texts, rng)
        if kind != Kind.INSTRUCT:
            valid_B = valid_B & ~_refuse_by_answering(language, operators_BO, texts)
        batches.append(Prompts(kind, operators_BO, texts)[np.nonzero(valid_B)[0]])
        if sum(map(len, batches)) >= n:
            return join_prompts(batches)[:n]
    raise TemperError(
        f"no {kind} prompts in this language: check n_unsafe_operators, n_contextual_operators,"
        " n_duplicates and dominance"
    )


def _draw_texts(
    language: Language, kind: Kind, n: int, split: str, rng: np.random.Generator
) -> Texts:
    if language.spec.safety_texts == "dominance":
        return language.draw_texts(n, split, rng)
    trained, tested = BRANCHES_OF[kind]
    return language.draw_texts(n, split, rng, tested if split == "test" else trained)


def _refuse_by_answering(language: Language, operators_BO: np.ndarray, texts: Texts) -> np.ndarray:
    """Whether the right answer is what a refusal is, the first letter throughout. Such prompts are
    left out: nobody could tell which it was.
    """
    spec = language.spec
    if spec.refusal == "token" or (spec.n_pairs > 1 and spec.counted == "all"):
        return np.zeros(len(operators_BO), dtype=bool)
    outputs = np.stack(language.outputs(texts.letters_BT, operators_BO))
    counted_B = language.counted_B(operators_BO) if spec.counted == "one" else 0
    output_BT = outputs[counted_B, np.arange(len(operators_BO))]
    same: np.ndarray = ((output_BT == 0) | (output_BT == PAD)).all(axis=1)
    return same


# -- drawing operators: functions of (language, texts, rng) that return operators_BO and valid_B

DrawOperators = Callable[
    [Language, Texts, np.random.Generator],
    tuple[np.ndarray, np.ndarray],
]


def _pick(allowed_BK: np.ndarray, n_slots: int, rng: np.random.Generator) -> np.ndarray:
    """Draw an allowed operator uniformly for each slot; rows without any get token 0."""
    scores = rng.random((allowed_BK.shape[0], n_slots, allowed_BK.shape[1]))
    picked: np.ndarray = np.where(allowed_BK[:, None, :], scores, -1.0).argmax(axis=2)
    return picked


def _insert_identities(
    language: Language, operators_BO: np.ndarray, texts: Texts, rng: np.random.Generator
) -> np.ndarray:
    """Replace operators by the identity, with the spec's probability, so that no pair has two; in
    place.
    """
    spec = language.spec
    n = len(operators_BO)
    n_slots = operators_BO.shape[1]
    if spec.identities == "released":
        is_identity_BO = rng.random((n, n_slots)) < _identity_share(language, texts)[:, None]
        forced_B = rng.random(n) < spec.identity_probability
        is_identity_BO[forced_B, rng.integers(0, n_slots, n)[forced_B]] = True
        pairs = is_identity_BO.reshape(n, -1, 2)
        # As released: where a pair would be the identity, both operators are drawn instead.
        pairs[pairs.all(axis=2)] = False
        operators_BO[is_identity_BO] = 0
        return operators_BO
    for pair in range(spec.n_pairs):
        hit_B = rng.random(n) < spec.identity_probability
        slot_B = 2 * pair + rng.integers(0, 2, n)
        operators_BO[hit_B, slot_B[hit_B]] = 0
    return operators_BO


def _identity_share(language: Language, texts: Texts) -> np.ndarray:
    """Share of the identity among the safe base operators of each text, of which the released safe
    prompts draw their slots; unsafe prompts keep the places of their identities.
    """
    n_safe_B = _mask_allowed(language, texts, language.base_operators, unsafe=False).sum(axis=1)
    share: np.ndarray = 1 / (1 + n_safe_B)
    return share


def _choose_segment(
    language: Language, operators_BO: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Make the first pair the identity in the share of prompts whose second segment counts; in
    place.
    """
    if language.spec.counted == "one":
        operators_BO[rng.random(len(operators_BO)) < language.spec.second_probability, :2] = 0
    return operators_BO


def _mask_allowed(language: Language, texts: Texts, tokens: np.ndarray, unsafe: bool) -> np.ndarray:
    """Mask ``B x K`` of the operators among ``tokens`` that are unsafe (safe) on each text."""
    all_BK = np.broadcast_to(
        np.arange(language.spec.n_operators), (len(texts.grammar_B), language.spec.n_operators)
    )
    member = np.isin(all_BK, tokens) & (all_BK != 0)
    allowed: np.ndarray = member & (language.unsafe_BO(all_BK, texts) == unsafe)
    return allowed


def _draw_uniform_safety(
    tokens_of: Callable[[Language], np.ndarray], unsafe: bool
) -> DrawOperators:
    """Operators that are all unsafe, or all safe, on a safe- or unsafe-dominant text."""

    def draw(
        language: Language, texts: Texts, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        allowed = _mask_allowed(language, texts, tokens_of(language), unsafe)
        operators = _pick(allowed, 2 * language.spec.n_pairs, rng)
        valid = allowed.any(axis=1) & (texts.dominance_B != MIXED)
        operators = _insert_identities(language, operators, texts, rng)
        return _choose_segment(language, operators, rng), valid

    return draw


def _draw_instruct(
    language: Language, texts: Texts, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Base operators, or duplicates alone, on any text; or all tokens (``identities=released``)."""
    n = len(texts.grammar_B)
    spec = language.spec
    if spec.identities == "released":
        operators = _draw_released(language, n, rng)
        return _insert_constants(language, operators, rng), np.ones(n, dtype=bool)
    operators = rng.integers(1, spec.n_base_operators, (n, 2 * spec.n_pairs))
    # A prompt never mixes duplicates with base operators: that would teach the model that they are
    # the same, and JB-MisGen would fail.
    if spec.n_duplicates:
        n_base = spec.n_base_operators
        share = spec.n_duplicates / (spec.n_duplicates + n_base - 1)
        duplicates = rng.integers(n_base, n_base + spec.n_duplicates, operators.shape)
        operators = np.where(rng.random((n, 1)) < share, duplicates, operators)
    operators = _insert_identities(language, operators, texts, rng)
    return _insert_constants(language, operators, rng), np.ones(n, dtype=bool)


def _draw_released(language: Language, n: int, rng: np.random.Generator) -> np.ndarray:
    """Every slot from all base and duplicate tokens; in a share of the prompts (half) one random
    slot from the identity and both duplicates of operator 2. Pairs with an identity: 37 %; prompts
    without: 40 %.
    """
    spec = language.spec
    operators = rng.integers(0, spec.n_base_operators + spec.n_duplicates, (n, 2 * spec.n_pairs))
    hit_B = rng.random(n) < spec.identity_probability
    slot_B = rng.integers(0, 2 * spec.n_pairs, n)
    pool = np.array([0, *language.duplicate_operators[-2:]])
    operators[hit_B, slot_B[hit_B]] = rng.choice(pool, n)[hit_B]
    return operators


def _insert_constants(
    language: Language, operators_BO: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Put a constant operator into one random slot of the spec's share of prompts; in place."""
    n = len(operators_BO)
    n_slots = operators_BO.shape[1]
    if language.spec.n_constant_operators:
        hit_B = rng.random(n) < language.spec.constant_share
        slot_B = rng.integers(0, n_slots, n)
        operators_BO[hit_B, slot_B[hit_B]] = rng.choice(language.constant_operators, n)[hit_B]
    return operators_BO


def _draw_task(
    language: Language, texts: Texts, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A task operator and the identity in each pair, in either order."""
    n = len(texts.grammar_B)
    operators = np.zeros((n, 2 * language.spec.n_pairs), dtype=np.int64)
    for pair in range(language.spec.n_pairs):
        slot = 2 * pair + rng.integers(0, 2, n)
        operators[np.arange(n), slot] = rng.choice(language.task_operators, n)
    return operators, texts.dominance_B != MIXED


def _draw_competing_task(
    language: Language, texts: Texts, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """An unsafe and a safe operator in each pair, in either order."""
    unsafe = _mask_allowed(language, texts, language.base_operators, unsafe=True)
    safe = _mask_allowed(language, texts, language.base_operators, unsafe=False)
    n = len(texts.grammar_B)
    n_pairs = language.spec.n_pairs
    pairs = np.stack([_pick(unsafe, n_pairs, rng), _pick(safe, n_pairs, rng)], axis=2)
    flip = rng.random((n, n_pairs)) < 0.5
    pairs[flip] = pairs[flip][:, ::-1]
    valid = unsafe.any(1) & safe.any(1) & (texts.dominance_B != MIXED)
    return _choose_segment(language, pairs.reshape(n, 2 * n_pairs), rng), valid


def _draw_competing_text(
    language: Language, texts: Texts, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Contextual operators on a mixed text."""
    tokens = np.arange(language.spec.n_operators)
    contextual = language.operator_class_GO[texts.grammar_B] == CLASS_C
    allowed = contextual & np.isin(tokens, language.base_operators)
    operators = _pick(allowed, 2 * language.spec.n_pairs, rng)
    operators = _insert_identities(language, operators, texts, rng)
    operators = _choose_segment(language, operators, rng)
    return operators, (texts.dominance_B == MIXED) & allowed.any(1)


def _draw_duplicates(
    language: Language, texts: Texts, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Unsafe duplicates; with the released pool, which has the identity's, any duplicates of it
    with an unsafe one in each pair.
    """
    spec = language.spec
    if spec.duplicates == "by_class":
        draw = _draw_uniform_safety(lambda language: language.misgen_operators, unsafe=True)
        return draw(language, texts, rng)
    operators = rng.choice(language.misgen_operators, (len(texts.grammar_B), 2 * spec.n_pairs))
    unsafe = language.unsafe_BO(operators, texts)
    harmless = ~unsafe & ~language.is_identity_O[operators]
    every_pair = (unsafe[:, ::2] | unsafe[:, 1::2]).all(axis=1)
    return operators, every_pair & ~harmless.any(axis=1) & (texts.dominance_B != MIXED)


_DRAW_OPERATORS: dict[Kind, DrawOperators] = {
    Kind.INSTRUCT: _draw_instruct,
    Kind.SAFE: _draw_uniform_safety(lambda language: language.base_operators, unsafe=False),
    Kind.UNSAFE: _draw_uniform_safety(lambda language: language.base_operators, unsafe=True),
    Kind.TASK: _draw_task,
    Kind.JB_CO_TASK: _draw_competing_task,
    Kind.JB_CO_TEXT: _draw_competing_text,
    Kind.JB_MISGEN: _draw_duplicates,
    Kind.JB_MISGEN_TEXT: _draw_uniform_safety(
        lambda language: language.base_operators, unsafe=True
    ),
}
