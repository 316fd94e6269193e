"""Examples in every layout, as hypothesis strategies and as files, for the tests of layouts."""

import csv
import json
from pathlib import Path

from hypothesis import strategies as st

from temper.data.examples import Example, Message
from temper.data.layouts import read_examples
from tests.errors import error_line

SOUP = {"instruction": "Cook soup", "input": "", "output": "Boil water"}

words = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20
).filter(str.strip)
blank_or_words = st.just("") | words
rounds = st.lists(st.tuples(words, words), max_size=2)


@st.composite
def examples(
    draw: st.DrawFn, n_answers: int = 1, turns: bool = True, marked: bool = False
) -> Example:
    """A conversation of some rounds, and answers to its last turn."""
    system = (Message("system", text),) if turns and (text := draw(blank_or_words)).strip() else ()
    earlier = (
        [m for ask, say in draw(rounds) for m in (Message("user", ask), Message("assistant", say))]
        if turns
        else []
    )
    answers = tuple(draw(words) for _ in range(n_answers))
    return Example(
        (*system, *earlier, Message("user", draw(words))),
        answers,
        draw(st.booleans()) if marked else None,
    )


def openai(messages: list[Message] | tuple[Message, ...]) -> list[dict]:
    return [{"role": m.role, "content": m.content} for m in messages]


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


def sharegpt(messages: list[Message] | tuple[Message, ...]) -> list[dict]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(m.role, m.role), "value": m.content} for m in messages]


def parts(messages: list[dict]) -> list[dict]:
    """LLaMA-Factory's v1: content in parts, and a weight of the loss."""
    return [
        {
            "role": m["role"],
            "content": [{"type": "text", "value": m["content"]}],
            "loss_weight": float(n == len(messages) - 1),
        }
        for n, m in enumerate(messages)
    ]


def whole(example: Example, answer: int = 0) -> list[dict]:
    return [*openai(example.prompt), said(example.answers[answer])]


pairs = examples(n_answers=2)
bare_pairs = examples(n_answers=2, turns=False)
one = examples()
bare = examples(turns=False)
# layout, what is wanted, examples, how one is written
WRITTEN = [
    ("messages", "supervised", one, lambda e: {"messages": whole(e)}),
    ("messages", "supervised", one, lambda e: {"messages": parts(whole(e))}),
    ("messages", "unlearning", pairs, lambda e: {"messages": whole(e), "idk": e.answers[1]}),
    (
        "sharegpt",
        "supervised",
        one,
        lambda e: {"conversations": [*sharegpt(e.prompt), {"from": "gpt", "value": e.answers[0]}]},
    ),
    (
        "prompt_completion",
        "supervised",
        one,
        lambda e: {"prompt": openai(e.prompt), "completion": [said(e.answers[0])]},
    ),
    (
        "preference",
        "preference",
        pairs,
        lambda e: {
            "prompt": openai(e.prompt),
            "chosen": said(e.answers[0]),
            "rejected": e.answers[1],
        },
    ),
    (
        "preference",
        "preference",
        pairs,
        lambda e: {"messages": openai(e.prompt), "chosen": whole(e), "rejected": whole(e, 1)},
    ),
    (
        "preference",
        "preference",
        pairs,
        lambda e: {"prompt": e.question, "chosen": whole(e), "rejected": whole(e, 1)},
    ),
    (
        "preference",
        "preference",
        pairs,
        lambda e: {
            "conversations": sharegpt(e.prompt),
            "chosen": {"from": "gpt", "value": e.answers[0]},
            "rejected": e.answers[1],
        },
    ),
    (
        "preference_messages",
        "preference",
        pairs,
        lambda e: {"chosen_messages": parts(whole(e)), "rejected_messages": parts(whole(e, 1))},
    ),
    (
        "preference_messages",
        "preference",
        pairs,
        lambda e: {"chosen": whole(e), "rejected": whole(e, 1)},
    ),
    (
        "kto_messages",
        "kto",
        examples(marked=True),
        lambda e: {"messages": whole(e), "label": e.desirable},
    ),
]
FLAT = [  # fit for tables too
    (
        "alpaca",
        "supervised",
        bare,
        lambda e: {"instruction": e.question, "input": "", "output": e.answers[0]},
    ),
    ("alpaca", "unlearning", bare, lambda e: {"instruction": e.question, "output": e.answers[0]}),
    (
        "prompt_completion",
        "supervised",
        bare,
        lambda e: {"question": e.question, "answer": e.answers[0], "source": "a book"},
    ),
    (
        "prompt_completion",
        "supervised",
        bare,
        lambda e: {"prompt": e.question, "response": e.answers[0]},
    ),
    (
        "prompt_completion",
        "unlearning",
        bare_pairs,
        lambda e: {"question": e.question, "answer": e.answers[0], "substitute": e.answers[1]},
    ),
    (
        "preference",
        "preference",
        bare_pairs,
        lambda e: {"prompt": e.question, "chosen": e.answers[0], "rejected": e.answers[1]},
    ),
    (
        "kto",
        "kto",
        examples(turns=False, marked=True),
        lambda e: {"prompt": e.question, "completion": e.answers[0], "label": str(e.desirable)},
    ),
    (
        "kto",
        "kto",
        examples(turns=False, marked=True),
        lambda e: {"instruction": e.question, "output": e.answers[0], "kto_tag": int(e.desirable)},
    ),
    ("prompt", "prompt", examples(n_answers=0, turns=False), lambda e: {"prompt": e.question}),
    (
        "prompt",
        "prompt",
        examples(n_answers=0, turns=False),
        lambda e: {"instruction": e.question, "input": ""},
    ),
]


def jsonl(rows: list, file: Path) -> Path:
    file.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return file


def table(rows: list[dict], file: Path) -> Path:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def contents(found: list[Example]) -> list[tuple]:
    return [
        ([(m.role, m.content, m.input) for m in e.prompt], e.answers, e.desirable) for e in found
    ]


def failure(file: Path, want: str = "supervised", **options: object) -> str:
    """The one line that reading a file ends with."""
    line = error_line(
        lambda: list(read_examples(file, want, flag="--data.path", **options))  # type: ignore[arg-type]
    )
    assert line.startswith(f"--data.path={file}: ")
    assert len(line) < 800 + len(str(file))
    return line
