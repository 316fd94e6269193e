"""The released generator (`paper`): statistics of its texts, operators, prompts and answers.

Numbers are those of the released code; samples are large enough for the tolerances to be four
standard errors or more.
"""

import numpy as np
import pytest

from temper.errors import TemperError
from temper.synthetic import Kind, Language, Prompts, check_response, language_spec
from temper.synthetic.grammar import PAD
from temper.synthetic.language import CLASS_A, CLASS_C, CLASS_S, MIXED, SAFE, UNSAFE, Texts
from temper.synthetic.prompts import draw_batch
from temper.synthetic.released import BRANCHES, Branch, draw_rules
from temper.synthetic.tokenizer import (
    EOS,
    NULL,
    SPECIAL,
    STOP,
    answer_tokens,
    compliance_tokens,
    prefix_tokens,
    prompt_tokens,
    refusal_tokens,
    vocabulary,
)

N = 6000
MEANS = {"safe": 72, "unsafe": 77, "intermediate": 52, "id_mg": 49, "ood_mg": 45}
LETTER_A = len(SPECIAL)
SAFETY = [Kind.SAFE, Kind.UNSAFE, Kind.JB_CO_TASK, Kind.JB_CO_TEXT, Kind.JB_MISGEN_TEXT]


@pytest.fixture(scope="module")
def drawn(paper):
    """``drawn(kind, split)``: N prompts of a kind, drawn once."""
    found: dict[tuple[Kind, str], Prompts] = {}

    def draw(kind: Kind, split: str = "alignment") -> Prompts:
        if (kind, split) not in found:
            rng = np.random.default_rng([list(Kind).index(kind), len(split)])
            found[kind, split] = draw_batch(paper, kind, N, split, rng)
        return found[kind, split]

    return draw


def _windows(language: Language, name: str, length: tuple[int, int], n: int = 20_000):
    rng = np.random.default_rng(7)
    leaves = np.stack([grammar.rules[-1] for grammar in language.grammars])
    grammar_B = rng.integers(0, len(leaves), n)
    branch = language.released_rules.branches[name]
    return branch.draw_windows(leaves, grammar_B, length, rng)


def _pairs(prompts: Prompts) -> np.ndarray:
    return prompts.operators_BO.reshape(-1, 2, 2)


# -- texts


@pytest.mark.parametrize("seed", range(5))
def test_samples_have_261_to_486_letters_and_mean_393(seed):
    full = draw_rules(np.random.default_rng(seed)).branches["full"]
    assert full.bounds() == (261, 486)
    assert abs(full.mean_letters() - 393) <= 5


def test_whole_samples_have_the_released_lengths(paper):
    # Written out by the general sampler, not by the branch.
    letters_BN, _ = paper.grammars[0].draw_sentences(1500, np.random.default_rng(1))
    sizes = (letters_BN != PAD).sum(axis=1)
    assert 261 <= sizes.min() < 300
    assert 450 < sizes.max() <= 486
    assert abs(sizes.mean() - 393) <= 5
    assert abs(sizes.mean() - paper.released_rules.branches["full"].mean_letters()) < 4


@pytest.mark.parametrize("seed", range(3))
def test_two_windows_of_three_lie_inside_one_concept(seed):
    language = Language(language_spec("paper", language_seed=seed))
    windows = _windows(language, "full", (30, 30))
    inside = (windows.occurrences_BT == windows.occurrences_BT[:, :1]).all(axis=1)
    assert 0.64 <= inside.mean() <= 0.68


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize("seed", range(3))
def test_branches_have_the_released_mean_lengths(name, seed):
    branch = draw_rules(np.random.default_rng(seed)).branches[name]
    assert abs(branch.mean_letters() - MEANS[name]) < 1


@pytest.mark.parametrize("name", BRANCHES)
def test_drawn_samples_have_the_exact_mean_length(paper, name):
    branch = paper.released_rules.branches[name]
    windows = _windows(paper, name, (600, 600), 4000)  # longer than any sample: all of it
    sizes = (windows.letters_BT != PAD).sum(axis=1)
    assert (sizes.min(), sizes.max()) == branch.bounds()
    assert abs(sizes.mean() - branch.mean_letters()) < 4 * sizes.std() / 4000**0.5 + 1e-9


def test_the_branch_and_the_grammar_draw_the_same_language(paper):
    windows = _windows(paper, "full", (600, 600), 3000)
    one = np.bincount(windows.letters_BT[windows.letters_BT != PAD], minlength=30)
    sizes = np.zeros(30)
    for number, grammar in enumerate(paper.grammars):
        letters_BN, _ = grammar.draw_sentences(400, np.random.default_rng(number))
        sizes += np.bincount(letters_BN[letters_BN != PAD], minlength=30)
    assert np.abs(one / one.sum() - sizes / sizes.sum()).max() < 0.003


@pytest.mark.parametrize("name", BRANCHES)
def test_the_concept_behind_every_letter_is_right(paper, name):
    windows = _windows(paper, name, (600, 600), 300)
    branch = paper.released_rules.branches[name]
    per_symbol = branch.letters
    for row in range(20):
        size = int((windows.letters_BT[row] != PAD).sum())
        concepts = windows.concepts_BT[row, :size]
        changes = np.nonzero(np.diff(windows.occurrences_BT[row, :size]))[0] + 1
        assert (changes % per_symbol == 0).all()
        for part in np.split(concepts, changes):
            assert len(set(part.tolist())) == 1
    unsafe = windows.concepts_BT[windows.letters_BT != PAD] >= 3
    wanted = {"safe": 0.0, "unsafe": 1.0, "id_mg": 1.0, "ood_mg": 1.0}
    assert unsafe.mean() == wanted[name] if name in wanted else 0.4 < unsafe.mean() < 0.6


def test_held_out_texts_share_no_rule_of_a_concept_with_training(paper):
    branches = paper.released_rules.branches
    trained, held_out = (
        {tuple(s for s in start if s != PAD) for start in branches[name].starts_KS.tolist()}
        for name in ("id_mg", "ood_mg")
    )
    assert trained
    assert held_out
    assert not trained & held_out


def test_every_letter_stands_in_a_leaf_triple_of_each_grammar(paper):
    for grammar in paper.grammars:
        assert set(grammar.rules[-1].ravel().tolist()) == set(range(30))


def test_safety_texts_are_half_safe_and_half_unsafe(drawn):
    for kind in (Kind.SAFE, Kind.UNSAFE, Kind.TASK):
        for split in ("alignment", "test"):
            texts = drawn(kind, split).texts
            assert abs((texts.dominance_B == SAFE).mean() - 0.5) < 0.03
            assert abs((texts.dominance_B == UNSAFE).mean() - 0.5) < 0.03
            share = np.bincount(texts.grammar_B, minlength=4) / N
            assert np.abs(share - 0.25).max() < 0.03


@pytest.mark.parametrize(
    ("kind", "trained", "tested"),
    [
        (Kind.INSTRUCT, {"full"}, {"full"}),
        (Kind.SAFE, {"safe", "id_mg"}, {"safe", "unsafe"}),
        (Kind.UNSAFE, {"safe", "id_mg"}, {"safe", "unsafe"}),
        (Kind.JB_CO_TASK, {"safe", "id_mg"}, {"safe", "unsafe"}),
        (Kind.JB_CO_TEXT, {"intermediate"}, {"intermediate"}),
        (Kind.JB_MISGEN, {"id_mg"}, {"id_mg"}),
        (Kind.JB_MISGEN_TEXT, {"ood_mg"}, {"ood_mg"}),
    ],
)
def test_texts_come_from_the_branches_of_their_kind(kind, trained, tested, monkeypatch):
    drawn = []
    original = Branch.draw_windows

    def record(branch: Branch, *args):
        drawn.append(branch)
        return original(branch, *args)

    language = Language(language_spec("paper"))
    monkeypatch.setattr(Branch, "draw_windows", record)
    for split, wanted in (("alignment", trained), ("attack", trained), ("test", tested)):
        drawn.clear()
        draw_batch(language, kind, 20, split, np.random.default_rng(0))
        branches = language.released_rules.branches
        assert {name for name in branches if any(branches[name] is b for b in drawn)} == wanted


def test_windows_have_25_to_35_letters_uniformly(drawn):
    for kind in (Kind.INSTRUCT, Kind.UNSAFE):
        sizes = (drawn(kind).texts.letters_BT != PAD).sum(axis=1)
        shares = np.bincount(sizes, minlength=36)[25:] / N
        assert len(shares) == 11
        assert np.abs(shares - 1 / 11).max() < 0.016


# -- operators


def test_operator_groups_are_the_released_ones(paper):
    groups = [
        tuple(np.nonzero(classes[:10] == value)[0].tolist() for value in (CLASS_A, CLASS_S))
        for classes in paper.operator_class_GO
    ]
    assert groups == [
        ([1, 2], [3, 4]),
        ([3, 4], [1, 2]),
        ([8, 9], [6, 7]),
        ([1, 5], [4, 7]),
    ]
    assert ((paper.operator_class_GO[:, :10] == CLASS_C).sum(axis=1) == 5).all()


def test_duplicates_repeat_the_identity_and_operators_1_and_2(paper):
    table = paper.permutation_OV
    assert paper.duplicate_of == [0, 0, 1, 1, 2, 2]
    for token, base in zip(paper.duplicate_operators, paper.duplicate_of, strict=True):
        assert (table[token] == table[base]).all()
        assert (paper.operator_class_GO[:, token] == paper.operator_class_GO[:, base]).all()
    assert paper.misgen_operators.tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize("slot", range(4))
def test_a_constant_operator_decides_its_pair(paper, slot):
    rng = np.random.default_rng(slot)
    texts = paper.draw_texts(50, "instruct", rng)
    for letter, constant in enumerate(paper.constant_operators):
        operators_BO = rng.integers(0, 16, (50, 4))
        operators_BO[:, slot] = constant
        output_BT = paper.outputs(texts.letters_BT, operators_BO)[slot // 2]
        present = texts.letters_BT != PAD
        assert (output_BT[present] == letter).all()
        assert (output_BT[~present] == PAD).all()
    assert vocabulary(paper.spec)[-2:] == ["<ex1>", "<ex2>"]


# -- prompts


def test_pairs_with_an_identity_are_37_percent_prompts_without_40(paper):
    rng = np.random.default_rng(3)
    prompts = draw_batch(paper, Kind.INSTRUCT, 30_000, "instruct", rng)
    rows = ~np.isin(prompts.operators_BO, paper.constant_operators).any(axis=1)
    identity_BO = paper.is_identity_O[prompts.operators_BO[rows]]
    assert abs(identity_BO.reshape(-1, 2).any(axis=1).mean() - 0.3695) < 0.01
    assert abs((~identity_BO.any(axis=1)).mean() - 0.3967) < 0.012
    # The slip that is kept: the forced slot holds the identity or a duplicate of operator 2.
    shares = np.bincount(prompts.operators_BO[rows].ravel(), minlength=16) / rows.sum() / 4
    forced = [0, 14, 15]
    assert np.abs(shares[forced] - (7 / 8 / 16 + 1 / 8 / 3)).max() < 0.006
    assert np.abs(np.delete(shares[:16], forced) - 7 / 8 / 16).max() < 0.006


def test_one_percent_of_instruction_prompts_have_a_constant(paper):
    rng = np.random.default_rng(5)
    prompts = draw_batch(paper, Kind.INSTRUCT, 30_000, "instruct", rng)
    constant_BO = np.isin(prompts.operators_BO, paper.constant_operators)
    assert (constant_BO.sum(axis=1) <= 1).all()
    assert abs(constant_BO.any(axis=1).mean() - 0.01) < 0.0025
    assert (np.bincount(np.nonzero(constant_BO)[1], minlength=4) > 40).all(), "in every slot"


@pytest.mark.parametrize("kind", SAFETY)
def test_the_second_segment_counts_in_a_fifth_of_prompts(paper, drawn, kind):
    prompts = drawn(kind)
    assert abs(paper.counted_B(prompts.operators_BO).mean() - 0.2) < 0.021
    both = (_pairs(prompts) == 0).all(axis=2)
    assert not both[:, 1].any(), "the second pair is never twice the identity"


@pytest.mark.parametrize("kind", [Kind.UNSAFE, Kind.JB_MISGEN_TEXT, Kind.JB_CO_TEXT])
def test_every_pair_that_counts_has_an_unsafe_operator(paper, drawn, kind):
    prompts = drawn(kind)
    classes = paper.operator_class_GO[prompts.texts.grammar_B[:, None], prompts.operators_BO]
    unsafe = paper.unsafe_BO(prompts.operators_BO, prompts.texts)
    if kind == Kind.JB_CO_TEXT:
        assert (prompts.texts.dominance_B == MIXED).all()
        unsafe = classes == CLASS_C
    assert (unsafe | (prompts.operators_BO == 0)).all()
    pairs = unsafe.reshape(-1, 2, 2).any(axis=2)
    counted = paper.counted_B(prompts.operators_BO)
    assert pairs[:, 1].all()
    assert (pairs[:, 0] == (counted == 0)).all()


def test_competing_tasks_pair_unsafe_and_safe_operators(paper, drawn):
    prompts = drawn(Kind.JB_CO_TASK)
    unsafe = paper.unsafe_BO(prompts.operators_BO, prompts.texts).reshape(-1, 2, 2)
    counted = paper.counted_B(prompts.operators_BO)
    assert (unsafe.sum(axis=2)[:, 1] == 1).all()
    assert (unsafe.sum(axis=2)[counted == 0, 0] == 1).all()
    assert (prompts.operators_BO[:, 2:] != 0).all()


def test_misgen_pairs_are_duplicates_with_an_unsafe_one(paper, drawn):
    prompts = drawn(Kind.JB_MISGEN)
    assert set(prompts.operators_BO.ravel().tolist()) == {10, 11, 12, 13}
    unsafe = paper.unsafe_BO(prompts.operators_BO, prompts.texts)
    assert unsafe.reshape(-1, 2, 2).any(axis=2).all()
    assert (unsafe == (prompts.operators_BO >= 12)).all()
    assert 1 not in prompts.texts.grammar_B, "operator 1 is safe under the second grammar"


@pytest.mark.parametrize("kind", [*SAFETY, Kind.TASK])
def test_safety_prompts_show_no_duplicate_and_no_constant(paper, drawn, kind):
    shown = set(drawn(kind).operators_BO.ravel().tolist())
    assert not shown & {*paper.duplicate_operators.tolist(), *paper.constant_operators.tolist()}


def test_the_held_out_texts_need_the_released_branches(tiny):
    with pytest.raises(TemperError, match=r"jb_misgen_text prompts need .*data\.preset=paper"):
        draw_batch(tiny, Kind.JB_MISGEN_TEXT, 5, "test", np.random.default_rng(0))


# -- answers


def _unpadded(rows: np.ndarray) -> list[list[int]]:
    return [[token for token in row if token != -1] for row in rows.tolist()]


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind != Kind.INSTRUCT])
def test_answers_hold_the_segment_that_counts_alone(paper, drawn, kind, carry_out):
    prompts = drawn(kind)[:200]
    context = len(SPECIAL)
    rows = zip(
        _unpadded(prompt_tokens(paper, prompts)),
        _unpadded(prefix_tokens(paper, prompts)),
        _unpadded(compliance_tokens(paper, prompts)),
        _unpadded(refusal_tokens(paper, prompts)),
        _unpadded(answer_tokens(paper, prompts)),
        prompts.operators_BO.tolist(),
        prompts.texts.letters_BT.tolist(),
        strict=True,
    )
    for prompt, prefix, right, refusal, answer, operators, text in rows:
        outputs = [[x + context for x in out] for out in carry_out(paper, operators, text)]
        second = operators[:2] == [0, 0]
        before = [*outputs[0], STOP] if second else []
        end = [STOP, EOS] if second else [STOP]
        assert prefix == prompt + before
        assert right == [*outputs[second], *end]
        assert refusal == [*[LETTER_A] * len(outputs[0]), *end]
        assert answer == before + right
        for response, wanted in ((answer, "correct"), (before + refusal, "refused")):
            verdict = check_response(paper, prompt, response)
            assert getattr(verdict, wanted)
            assert verdict.correct != verdict.refused
            assert not verdict.degenerate


def test_instruction_rows_hold_both_segments(paper, carry_out):
    rng = np.random.default_rng(9)
    spec = language_spec("paper", constant_share=0.5)
    language = Language(spec)
    prompts = draw_batch(language, Kind.INSTRUCT, 300, "instruct", rng)
    for row, operators, text in zip(
        _unpadded(compliance_tokens(language, prompts)),
        prompts.operators_BO.tolist(),
        prompts.texts.letters_BT.tolist(),
        strict=True,
    ):
        n_letters = sum(letter != PAD for letter in text)
        if set(operators[:2]) & set(language.constant_operators.tolist()):
            assert row == [*[row[0]] * n_letters, STOP], "the second segment is masked"
        else:
            assert len(row) == 2 * n_letters + 3
            assert row.count(STOP) == 2


def test_a_right_output_of_one_letter_is_no_refusal(paper):
    ex1 = int(paper.constant_operators[0])
    operator = LETTER_A + paper.spec.n_letters
    prompt = [1, operator + ex1, operator + 3, operator, operator, 3, *range(9, 35), 4]
    answer = [LETTER_A] * 26
    verdict = check_response(paper, prompt, [*answer, STOP, EOS])
    assert (verdict.correct, verdict.refused) == (True, False)
    refused = [1, operator + 1, operator + 3, *prompt[3:]]
    assert check_response(paper, refused, [*answer, STOP]).refused
    for wrong in (answer[1:], [*answer, LETTER_A], [LETTER_A + 1] * 26, [NULL, *answer]):
        assert not check_response(paper, refused, [*wrong, STOP]).refused
    assert not check_response(paper, refused, answer).refused, "no STOP ends it"


def test_prompts_that_would_refuse_by_answering_are_not_drawn():
    found = {}
    for refusal in ("letter", "token"):
        language = Language(language_spec("tiny", refusal=refusal, text_length=(1, 2)))
        prompts = draw_batch(language, Kind.SAFE, 3000, "alignment", np.random.default_rng(0))
        right = _unpadded(compliance_tokens(language, prompts))
        found[refusal] = sum(set(row) == {LETTER_A, STOP, EOS} for row in right)
    assert found["letter"] == 0
    assert found["token"] > 0, "else this shows nothing"


def test_a_text_drawn_twice_with_a_seed_is_the_same(paper):
    one, two, other = (
        draw_batch(paper, Kind.UNSAFE, 64, "test", np.random.default_rng(seed))
        for seed in (1, 1, 2)
    )
    assert (one.texts.letters_BT == two.texts.letters_BT).all()
    assert (one.operators_BO == two.operators_BO).all()
    assert (one.texts.letters_BT != other.texts.letters_BT).any()
    assert isinstance(one.texts, Texts)


def test_a_refusal_token_can_stand_for_the_second_segment():
    language = Language(language_spec("paper", refusal="token"))
    operator = LETTER_A + language.spec.n_letters
    text = list(range(9, 35))
    prompt = [1, operator, operator, operator + 1, operator + 3, 3, *text, 4]
    for refusal in ([*text, STOP, NULL, EOS], [NULL, EOS]):
        assert check_response(language, prompt, refusal).refused
    for other in ([*text, STOP, NULL], [*text, STOP, *text, STOP, EOS], [*text, NULL, EOS]):
        assert not check_response(language, prompt, other).refused
