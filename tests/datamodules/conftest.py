"""Small files of every kind of text data, and datamodules on them."""

import pytest

from tests.datamodules.text_rows import DISHES, REFUSAL
from tests.text import make_tokenizer, write_lines

# Settings that are no file, although they are text.
PLAIN = (
    "template",
    "truncation",
    "overlap",
    "layout",
    "eval_layout",
    "stream",
    "system",
    "tokenizer",
    "test",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, and small files of every kind."""
    folder = tmp_path_factory.mktemp("text")
    make_tokenizer("gemma").save_pretrained(folder / "tokenizer")

    def ask(dish: str) -> str:
        return f"How do I make {dish}?"

    def answer(dish: str) -> str:
        return f"Take some {dish} and cook it."

    files = {
        "user": [{"instruction": f"Say {d}.", "output": d} for d in DISHES],
        "harmful": [{"prompt": ask(d), "completion": answer(d)} for d in DISHES[:6]],
        "alignment": [
            {
                "messages": [
                    {"role": "user", "content": ask(d)},
                    {"role": "assistant", "content": REFUSAL},
                ]
            }
            for d in DISHES[:8]
        ],
        "pairs": [{"prompt": ask(d), "chosen": REFUSAL, "rejected": answer(d)} for d in DISHES[:8]],
        "safe_pairs": [
            {"prompt": f"Say {d}.", "chosen": d, "rejected": REFUSAL} for d in DISHES[:4]
        ],
        "kto": [
            {"prompt": ask(d), "completion": (REFUSAL, answer(d))[i % 2], "label": i % 2 == 0}
            for i, d in enumerate(DISHES[:8])
        ],
        "forget": [
            {"prompt": ask(d), "completion": answer(d), "substitute": REFUSAL} for d in DISHES[:8]
        ],
        "forget_alone": [{"prompt": ask(d), "completion": answer(d)} for d in DISHES[:8]],
        "retain": [{"prompt": f"Say {d}.", "completion": d} for d in DISHES[:8]],
        "holdout": [{"prompt": ask(d), "completion": answer(d)} for d in DISHES[8:]],
        "unsafe": [{"prompt": ask(d)} for d in DISHES[8:]],
        "safe": [{"prompt": f"Spell {d}.", "completion": " ".join(d)} for d in DISHES[:3]],
        "task": [{"instruction": f"Count {d}.", "output": str(len(d))} for d in DISHES[:2]],
    }
    for name, rows in files.items():
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def make(folder, tmp_path):
    """``make(kind, user="user", ...)``: a datamodule that has been set up; values that name a file
    become its path.
    """

    def made(kind, setup="fit", **arguments):
        path = {
            key: str(folder / f"{value}.jsonl")
            for key, value in arguments.items()
            if isinstance(value, str) and key not in PLAIN
        }
        data = kind(
            **{
                "tokenizer": str(folder / "tokenizer"),
                "cache": str(tmp_path / "cache"),
                "batch_size": 2,
            }
            | arguments
            | path
        )
        if setup:
            data.prepare_data()
            data.setup(setup)
        return data

    return made
