"""What the small files of `conftest.folder` hold, and rows of tokens as text again."""

import torch

from temper.data import Batch, sequence

DISHES = [
    "bread",
    "soup",
    "apple pie",
    "pasta",
    "stew",
    "salad",
    "cake",
    "rice",
    "beans",
    "toast",
    "jam",
    "curd",
]
REFUSAL = "I would rather not talk about recipes, sorry."


def row_texts(data, rows: Batch) -> list[tuple[str, str]]:
    """(prompt, answer) of rows of one sequence, after checking labels and padding."""
    found = []
    for ids, present, labels in zip(
        rows["input_ids"], rows["attention_mask"], rows["labels"], strict=True
    ):
        n = int(present.sum())
        trained = labels != -100
        assert present.tolist() == [1] * n + [0] * (len(ids) - n) and not trained[n:].any()
        assert torch.equal(labels[trained], ids[trained]) and trained[:n].tolist() == sorted(
            trained[:n].tolist()
        )
        prompt, answer = (
            data.tokenizer.decode(ids[:n][mask]) for mask in (~trained[:n], trained[:n])
        )
        found.append(
            (
                prompt.split("user\n")[1].split("<end_of_turn>")[0],
                answer.removesuffix("<end_of_turn>"),
            )
        )
    return found


def stream_texts(data, name: str, which: int | None = None) -> list[tuple[str, str]]:
    """(prompt, answer) of every row of a stream; of the ``which``-th sequence of every row."""
    rows = data.sources[name].rows
    assert rows["ids"].tolist() == list(range(len(rows["ids"])))
    return row_texts(data, rows if which is None else sequence(rows, which))


ASKED = [(f"How do I make {d}?", f"Take some {d} and cook it.") for d in DISHES]
REFUSED = [(question, REFUSAL) for question, _ in ASKED]
SAID = [(f"Say {d}.", d) for d in DISHES]
KEYS = {"input_ids", "attention_mask", "labels", "ids"}
