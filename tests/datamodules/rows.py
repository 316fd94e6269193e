"""Set-up of synthetic datamodules, and the prompts and answers in their rows."""

from typing import TypeVar

from datamodules.synthetic import SyntheticDataModule
from temper.data import Batch
from temper.synthetic.tokenizer import EOT, PAD_ID

Data = TypeVar("Data", bound=SyntheticDataModule)
Tokens = tuple[int, ...]


def ready(data: Data) -> Data:
    """The datamodule, set up to train."""
    data.setup("fit")
    return data


def prompts_and_answers(rows: Batch, which: int | None = None) -> list[tuple[Tokens, Tokens]]:
    """(prompt, answer) of one sequence of every row, after checking that padding is on the right
    and that the answer and nothing else is labelled.

    Args:
        rows: Rows of one sequence (N, T), or of several (N, K, T).
        which: The sequence to read where a row has several.
    """
    found = []
    picked = [
        rows[name] if which is None else rows[name][:, which]
        for name in ("input_ids", "attention_mask", "labels")
    ]
    for ids, present, labels in zip(*(tensor.tolist() for tensor in picked), strict=True):
        size = sum(present)
        end = ids.index(EOT) + 1
        assert present == [1] * size + [0] * (len(ids) - size)
        assert ids[size:] == [PAD_ID] * (len(ids) - size)
        assert labels == [-100] * end + ids[end:size] + [-100] * (len(ids) - size)
        found.append((tuple(ids[:end]), tuple(ids[end:size])))
    return found
