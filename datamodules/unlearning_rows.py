"""Rows of an unlearning evaluation on the synthetic language: true answers and wrong ones.

Shapes: `B` rows, `K` answers to a prompt, `T` tokens of a sequence, `P` prompt tokens, `R` answer
tokens, `O` operators of a prompt.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from temper.data import Batch, make_rows, pair_rows
from temper.errors import TemperError
from temper.synthetic import Kind, Language, Prompts
from temper.synthetic.grammar import PAD
from temper.synthetic.prompts import AnsweredPrompts, draw_prompts, join_prompts
from temper.synthetic.tokenizer import PAD_ID, compliance_tokens, prefix_tokens

# Names of the streams to forget and to retain; the first one that the data have is used.
FORGET = ("forget", "harmful")
RETAIN = ("retain", "alignment")
# Parts of the random stream of the role "probe" (the probe rows themselves are part 0): one for
# the wrong answers of each set, and one for the unseen prompts.
WRONG_ANSWERS = {"forget": 11, "holdout": 12, "retain": 13}
UNSEEN = 10
MAX_DRAWS = 1000  # of operators for wrong answers


class DrawnData(Protocol):
    """What is read of a datamodule on the synthetic language; `SyntheticDataModule` has it."""

    language: Language
    n_eval: int
    eval_split: str
    stream_prompts: dict[str, list[AnsweredPrompts]]

    def rng(self, role: str, part: int = 0) -> np.random.Generator:
        """The random stream of a role, or of a numbered part of it."""
        ...


def synthetic_unlearning_rows(
    data: DrawnData,
    n_rows: int | None = None,
    n_perturbed: int = 5,
    forget: str | None = None,
    retain: str | None = None,
) -> dict[str, Batch]:
    """Draw the rows that `callbacks.UnlearningEvaluation` measures on, after ``data.setup``.

    Every row is ``B x K x T``: a prompt with its true answer, then with ``n_perturbed`` wrong ones
    (``K = 1 + n_perturbed``). A wrong answer is the exact answer to the same text under other
    operators, drawn uniformly; the answers of a row all differ. Sets:

    * ``forget``: the first prompts of the training stream ``forget`` (or ``harmful``), with their
      answers;
    * ``holdout``: as many unsafe prompts of the evaluation split, whose texts no stage trains on;
    * ``retain``: the first prompts of the stream ``retain`` (or ``alignment``) that it answers.

    The rows depend on the datamodule's prompts, its seed and the arguments alone: every stage and
    rank has the same.

    Args:
        data: A datamodule that has been set up.
        n_rows: Rows of each set, or fewer where a stream has fewer; None: ``data.n_eval``.
        n_perturbed: Wrong answers per row.
        forget: Stream of the rows to be forgotten; None: ``forget``, or ``harmful``.
        retain: Stream of the rows to be kept; None: ``retain``, or ``alignment``.

    Raises:
        TemperError: the data have no such stream, the stream to be kept answers no prompt, or the
            language has too few different answers.
    """
    n_rows = data.n_eval if n_rows is None else n_rows
    kept = _stream_prompts(data, (retain,) if retain else RETAIN, "retain")
    forgotten = _stream_prompts(data, (forget,) if forget else FORGET, "forget")
    answered = [prompts for prompts, comply in kept if comply and len(prompts)]
    if not answered:
        raise TemperError(
            f"data={type(data).__name__}: the stream to retain answers no prompt, and"
            " UnlearningEvaluation measures how it is answered; give it safe prompts"
            " (data.init_args.safe_share above 0), or drop the callback"
        )
    unsafe = join_prompts([prompts for prompts, _ in forgotten])[:n_rows]
    unseen = draw_prompts(
        data.language, Kind.UNSAFE, len(unsafe), data.eval_split, data.rng("probe", UNSEEN)
    )
    sets = {"forget": unsafe, "holdout": unseen, "retain": join_prompts(answered)[:n_rows]}
    return {
        name: _with_wrong_answers(
            data, prompts, n_perturbed, data.rng("probe", WRONG_ANSWERS[name])
        )
        for name, prompts in sets.items()
    }


def _stream_prompts(data: DrawnData, names: Sequence[str], role: str) -> list[AnsweredPrompts]:
    """The prompts of the first of these streams that the data have."""
    for name in names:
        if name in data.stream_prompts:
            return data.stream_prompts[name]
    found = ", ".join(map(repr, data.stream_prompts)) or "none of fixed rows"
    raise TemperError(
        f"data={type(data).__name__}: UnlearningEvaluation needs a stream"
        f" {' or '.join(map(repr, names))} (rows to {role}), and there is {found}; to measure a"
        " model after another stage, `validate` its export with data that have one"
    )


def _with_wrong_answers(
    data: DrawnData, prompts: Prompts, n_perturbed: int, rng: np.random.Generator
) -> Batch:
    """Rows ``B x (1 + n_perturbed) x T``: the prompt with its answer, then with wrong ones."""
    prompt_BP = prefix_tokens(data.language, prompts)
    right_BR = compliance_tokens(data.language, prompts)
    answers = [right_BR] + [np.full_like(right_BR, PAD) for _ in range(n_perturbed)]
    n_operators = data.language.spec.n_base_operators
    counted_B = data.language.counted_B(prompts.operators_BO)
    for _ in range(MAX_DRAWS):
        # Rows that still lack an answer take the drawn one; a draw that repeats one of the row's
        # answers is dropped.
        operators_BO = rng.integers(0, n_operators, prompts.operators_BO.shape)
        drawn_BR = compliance_tokens(
            data.language, replace(prompts, operators_BO=operators_BO), counted_B
        )
        fresh_B = ~np.any([(drawn_BR == answer_BR).all(axis=1) for answer_BR in answers], axis=0)
        for answer_BR in answers[1:]:
            taken_B = fresh_B & (answer_BR[:, 0] == PAD)
            answer_BR[taken_B] = drawn_BR[taken_B]
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
