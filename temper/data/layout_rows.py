"""One function per layout, which makes a conversation and its answers of a row's cells.

Columns are read by their role (prompt, answer, system, ...), each under the names that common files
give it. `temper.data.layouts` checks afterwards whether the answers are what the caller wants.
"""

from dataclasses import replace

from temper.data.examples import Example, Message
from temper.data.readers import Cells, RowError, kind, quote
from temper.data.turns import read_text, read_tools, read_turn, read_turns, split_answer

Names = tuple[str, ...]

PLAIN_PROMPT: Names = ("prompt", "question", "query")
TURNS: Names = ("messages", "conversations", "conversation")
PROMPT: Names = (*PLAIN_PROMPT, "instruction", *TURNS)
ANSWER: Names = ("completion", "response", "answer")
OUTPUT: Names = ("output", "response")
LABEL: Names = ("label", "kto_tag")
CHOSEN: Names = ("chosen", "chosen_messages")
REJECTED: Names = ("rejected", "rejected_messages")
INPUT: Names = ("input", "context")
SUBSTITUTE: Names = ("substitute", "idk")
PARAPHRASE = "paraphrased_answer"
PERTURBED = "perturbed_answer"
ASIDE: Names = ("system", "tools")  # read beside any prompt

MARKS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def find(cells: Cells, names: Names) -> str | None:
    """First of the names whose cell is there and not null."""
    return next((name for name in names if cells.get(name) is not None), None)


def plain_row(cells: Cells) -> Example:
    """A prompt and an answer, each text or turns."""
    return _answered(cells, (*PLAIN_PROMPT,), ANSWER)


def alpaca_row(cells: Cells) -> Example:
    """Instruction, optional input, output; optional system and history."""
    return _answered(cells, ("instruction",), OUTPUT)


def turns_row(cells: Cells) -> Example:
    """A conversation whose last assistant turn is the answer; without one it is a prompt."""
    prompt, answer = split_answer(_prompt(cells, TURNS))
    return _example(cells, prompt, *(() if answer is None else (answer,)))


def prompt_row(cells: Cells, names: Names = PROMPT) -> Example:
    """A prompt alone, from the first of these columns."""
    return _example(cells, _prompt(cells, names))


def preference_row(cells: Cells) -> Example:
    """Chosen and rejected answers (text, one turn, or turns that end in the answer) to one prompt.

    Where the answers are turns, those before the last must be the same in both, and end in the
    prompt if there is one.
    """
    context, chosen = _reply(cells, CHOSEN)
    other, rejected = _reply(cells, REJECTED)
    if [replace(m, trained=None) for m in context] != [replace(m, trained=None) for m in other]:
        raise RowError(
            "chosen and rejected do not answer the same conversation: their turns before the answer"
            " differ"
        )
    column = find(cells, PROMPT)
    if not column and not context:
        raise RowError(
            "chosen and rejected are answers alone, and there is no prompt; add one of"
            f" {', '.join(PROMPT)}"
        )
    if not column or not context:
        prompt = _prompt(cells, (column,)) if column else _with_aside(cells, context)
    else:
        prompt = _same_prompt(_prompt(cells, (column,)), _with_aside(cells, context), column)
    return _example(cells, prompt, chosen, rejected)


def kto_row(cells: Cells) -> Example:
    """A prompt, a completion, and whether it is desirable."""
    column = find(cells, PLAIN_PROMPT) or "instruction"
    return replace(_answered(cells, (column,), (*ANSWER, "output")), desirable=_mark(cells))


def kto_turns_row(cells: Cells) -> Example:
    """A conversation, and whether its last turn is desirable."""
    return replace(turns_row(cells), desirable=_mark(cells))


def with_measured(example: Example, cells: Cells) -> Example:
    """The example with the answers that the truth ratio compares, in TOFU's columns, if there are
    any: a paraphrase of the right one, and a list of wrong ones (or a single one).
    """
    paraphrase = cells.get(PARAPHRASE)
    wrong = cells.get(PERTURBED)
    if wrong is None:
        wrong = []
    texts = [wrong] if isinstance(wrong, str) else wrong
    # A list that a table could hold as text alone would be measured as one strange answer.
    as_text = isinstance(wrong, str) and wrong.strip()[:1] == "[" and wrong.strip()[-1:] == "]"
    if as_text or not isinstance(texts, list | tuple):
        raise RowError(f"column {PERTURBED!r} is {kind(wrong)}, wanted a list of wrong answers")
    perturbed = tuple(read_text(text, f"column {PERTURBED!r}") for text in texts)
    given = None if paraphrase is None else read_text(paraphrase, f"column {PARAPHRASE!r}")
    for column, answers in (
        (PERTURBED, perturbed),
        (PARAPHRASE, () if given is None else (given,)),
    ):
        if not all(answer.strip() for answer in answers):
            raise RowError(f"column {column!r} holds an empty answer")
    return replace(example, paraphrase=given, perturbed=perturbed)


def _answered(cells: Cells, prompt: Names, answer: Names) -> Example:
    context, reply = _reply(cells, answer)
    if context:
        raise RowError(
            f"column {find(cells, answer)!r} holds {len(context) + 1} turns, wanted the answer"
            " alone"
        )
    return _example(cells, _prompt(cells, prompt), reply)


def _example(cells: Cells, prompt: tuple[Message, ...], *replies: Message) -> Example:
    """An example with the row's tools; answers that are more than text are kept as turns too."""
    return Example(
        prompt,
        tuple(reply.content for reply in replies),
        tools=read_tools(cells.get("tools")),
        turns=replies if any(r.reasoning or r.tool_calls for r in replies) else (),
    )


def _reply(cells: Cells, names: Names) -> tuple[tuple[Message, ...], Message]:
    """Turns before an answer, and the answer."""
    column = find(cells, names) or names[0]
    value = cells.get(column)
    if isinstance(value, str) or not isinstance(value, list | dict):
        return (), Message("assistant", read_text(value, f"column {column!r}"))
    turns = (
        read_turns(value, column)
        if isinstance(value, list)
        else (read_turn(value, f"column {column!r}"),)
    )
    context, answer = split_answer(turns)
    if answer is None:
        raise RowError(
            f"column {column!r} does not end in an assistant's turn; it holds"
            f" {', '.join(m.role for m in turns) or 'no turns'}"
        )
    return context, answer


def _same_prompt(
    prompt: tuple[Message, ...], context: tuple[Message, ...], column: str
) -> tuple[Message, ...]:
    """Longer of two ways to give one prompt: in its own column, and as the turns before the
    answers.
    """
    first, asked = _apart(prompt)
    second, said = _apart(context)
    if [m.text for m in asked] != [m.text for m in said[len(said) - len(asked) :]] or (
        first and second and first != second
    ):
        raise RowError(f"column {column!r} is not the prompt in the turns of chosen and rejected")
    return (*(second or first), *said)


def _apart(turns: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """A leading system turn, and the other turns."""
    n_system = sum(message.role == "system" for message in turns[:1])
    return turns[:n_system], turns[n_system:]


def _prompt(cells: Cells, names: Names) -> tuple[Message, ...]:
    """Turns of a prompt, with system text and input from other columns."""
    column = find(cells, names) or names[0]
    value = cells.get(column)
    if column in TURNS or isinstance(value, list):
        return _with_aside(cells, read_turns(value, column))
    extra = find(cells, INPUT) if column == "instruction" else None
    about = read_text(cells[extra], f"column {extra!r}") if extra else ""
    return _with_aside(
        cells,
        (
            *_history(cells),
            Message("user", read_text(value, f"column {column!r}"), about if about.strip() else ""),
        ),
    )


def _history(cells: Cells) -> tuple[Message, ...]:
    """Earlier rounds of an alpaca row: pairs of a question and its answer."""
    rounds = cells.get("history") or ()
    if not isinstance(rounds, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in rounds
    ):
        raise RowError(
            f"column 'history' is {kind(rounds)}, wanted a list of pairs: question, answer"
        )
    roles = ("user", "assistant")
    return tuple(
        Message(role, read_text(text, "column 'history'"))
        for pair in rounds
        for role, text in zip(roles, pair, strict=True)
    )


def _with_aside(cells: Cells, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """Turns that begin with the system text of its own column, if there is one."""
    given = cells.get("system")
    system = read_text(given, "column 'system'") if given is not None else ""
    first, rest = _apart(turns)
    opening = first[0].content if first else ""
    if system.strip() and opening and system != opening:
        raise RowError("column 'system' and the first turn are different system texts; keep one")
    text = opening or system
    return (Message("system", text), *rest) if text.strip() else rest


def read_mark(value: object) -> bool | None:
    """Whether a cell marks an answer as desirable; None if it is no mark."""
    return MARKS.get(str(value).strip().lower())


def _mark(cells: Cells) -> bool:
    column = find(cells, LABEL) or LABEL[0]
    mark = read_mark(cells.get(column))
    if mark is None:
        raise RowError(
            f"column {column!r} is {quote(cells.get(column))}; wanted true (desirable) or false, or"
            " 1 or 0"
        )
    return mark
