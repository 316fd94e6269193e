"""Rows of an unlearning evaluation on the synthetic language, for any of its datamodules."""

from dataclasses import replace

import numpy as np
from torch import Tensor

from datamodules.synthetic import SyntheticDataModule
from temper.data import Batch, make_rows, pair_rows
from temper.errors import TemperError
from temper.synthetic import Kind, Language, Prompts
from temper.synthetic.grammar import PAD
from temper.synthetic.language import Texts
from temper.synthetic.prompts import draw_prompts
from temper.synthetic.tokenizer import EOT, NULL, PAD_ID, SPECIAL, compliance_tokens, prompt_tokens

FORGET, RETAIN = ("forget", "harmful"), ("retain", "alignment")  # streams; the first that is there
# Random streams of the role "probe" (part 0 is the probe): of wrong answers, and of the unseen
# prompts.
WRONG_ANSWERS, UNSEEN = {"forget": 11, "holdout": 12, "retain": 13}, 10


def synthetic_unlearning_rows(
    data: SyntheticDataModule,
    n_rows: int | None = None,
    n_perturbed: int = 5,
    forget: str | None = None,
    retain: str | None = None,
) -> dict[str, Batch]:
    """What `callbacks.UnlearningEvaluation` measures on; call it after ``data.setup``.

    Every row is ``B x K x T``: a prompt with its true answer, then with ``n_perturbed`` wrong ones.
    A wrong answer is the exact answer to the same text under other operators, drawn uniformly; a
    row's answers all differ. Sets:

    * ``forget``: the first unsafe prompts of the training stream ``forget`` (or ``harmful``), with
      their answers;
    * ``holdout``: as many unsafe prompts of the evaluation split, whose texts no stage trains on;
    * ``retain``: the first prompts of the stream ``retain`` (or ``alignment``) that it answers.

    The rows depend on the datamodule's rows, its seed and the arguments alone: every stage and rank
    has the same.

    Args:
        data: A datamodule that has been set up.
        n_rows: Rows of each set, as far as the streams go; None: ``data.n_eval``.
        n_perturbed: Wrong answers per row.
        forget: Stream of the rows to be forgotten; None: ``forget``, or ``harmful``.
        retain: Stream of the rows to be kept; None: ``retain``, or ``alignment``.

    Raises:
        TemperError: the data have no such stream, or the language has too few different answers.
    """
    n_rows = data.n_eval if n_rows is None else n_rows
    to_keep = _pool(data, retain, RETAIN, "retain")
    answered_B = ~(_first(to_keep["labels"]) == NULL).any(-1)
    unsafe = read_prompts(
        data.language,
        _first(_pool(data, forget, FORGET, "forget")["input_ids"])[:n_rows],
        Kind.UNSAFE,
    )
    safe = read_prompts(data.language, _first(to_keep["input_ids"])[answered_B][:n_rows], Kind.SAFE)
    unseen = draw_prompts(
        data.language, Kind.UNSAFE, len(unsafe), data.eval_split, data.rng("probe", UNSEEN)
    )
    sets = {"forget": unsafe, "holdout": unseen, "retain": safe}
    return {
        name: _with_wrong_answers(
            data, prompts, n_perturbed, data.rng("probe", WRONG_ANSWERS[name])
        )
        for name, prompts in sets.items()
    }


def read_prompts(language: Language, ids_BT: Tensor, kind: Kind) -> Prompts:
    """Operators and letters of prompts written in tokens; which grammar wrote a text cannot be
    read, nor its dominance.
    """
    ids_BT, n_operators, longest = (
        ids_BT.numpy(),
        2 * language.spec.n_pairs,
        language.spec.text_length[1],
    )
    operators_BO = ids_BT[:, 1 : 1 + n_operators] - len(SPECIAL) - language.spec.n_letters
    tokens_BT = ids_BT[:, 2 + n_operators : 2 + n_operators + longest]
    ended_BT = np.cumsum(tokens_BT == EOT, axis=1) > 0
    letters_BT = np.where(ended_BT, PAD, tokens_BT - len(SPECIAL))
    unknown_B = np.full(len(ids_BT), -1)
    return Prompts(kind, operators_BO, Texts(letters_BT, unknown_B, unknown_B))


def _pool(data: SyntheticDataModule, asked: str | None, usual: tuple[str, ...], role: str) -> Batch:
    """All rows of the stream for a role."""
    names = (asked,) if asked else usual
    for name in names:
        pool = getattr(data.sources.get(name), "pool", None)
        if pool is not None:
            return pool[:]
    raise TemperError(
        f"data={type(data).__name__}: unlearning figures need a stream"
        f" {' or '.join(map(repr, names))} (rows to {role}), and there is"
        f" {', '.join(map(repr, data.sources))}; to measure a model after another stage, `validate`"
        " its export with such data"
    )


def _first(tensor: Tensor) -> Tensor:
    """The first sequence of every row."""
    return tensor[:, 0] if tensor.ndim == 3 else tensor


def _with_wrong_answers(
    data: SyntheticDataModule, prompts: Prompts, n_perturbed: int, rng: np.random.Generator
) -> Batch:
    """Rows ``B x (1 + n_perturbed) x T``: the prompt with its answer, then with wrong ones."""
    prompt_BP, right_BR = (
        prompt_tokens(data.language, prompts),
        compliance_tokens(data.language, prompts),
    )
    answers = [right_BR] + [np.full_like(right_BR, PAD) for _ in range(n_perturbed)]
    for _ in range(1000):
        # Rows that lack an answer get another try; a try that repeats one of the row's answers is
        # dropped.
        operators_BO = rng.integers(
            0, data.language.spec.n_base_operators, prompts.operators_BO.shape
        )
        tried_BR = compliance_tokens(data.language, replace(prompts, operators_BO=operators_BO))
        fresh_B = ~np.any([(tried_BR == answer_BR).all(axis=1) for answer_BR in answers], axis=0)
        for answer_BR in answers[1:]:
            taken_B = fresh_B & (answer_BR[:, 0] == PAD)
            answer_BR[taken_B] = tried_BR[taken_B]
            fresh_B &= ~taken_B
        if not any((answer_BR[:, 0] == PAD).any() for answer_BR in answers[1:]):
            break
    else:
        raise TemperError(
            f"data={type(data).__name__}: a prompt has fewer than {n_perturbed} different wrong"
            " answers in this language; give a smaller n_perturbed, or a language with longer"
            " texts or more operators"
        )
    return pair_rows(*(make_rows(prompt_BP, answer_BR, PAD_ID) for answer_BR in answers))
