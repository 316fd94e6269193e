"""Unlearning data: the answer and its substitute, the same prompts as the alignment data, every row
once a pass.
"""

import pytest
import torch

from datamodules import SyntheticAlignment
from datamodules.synthetic_unlearning import SyntheticUnlearning
from temper.errors import TemperError
from temper.synthetic.prompts import prompt_keys
from temper.synthetic.tokenizer import EOS, EOT, NULL, PAD_ID


def ready(kind=SyntheticUnlearning, **changes):
    sizes = {
        "preset": "tiny",
        "n_forget": 12,
        "n_retain": 9,
        "batch_size": 4,
        "retain_batch_size": 3,
        "n_eval": 10,
        "seed": 3,
    }
    data = kind(
        **(sizes if kind is SyntheticUnlearning else {"preset": "tiny", "n_eval": 10, "seed": 3})
        | changes
    )
    data.setup("fit")
    return data


def words(rows, *place: int) -> tuple[list[int], list[int]]:
    """(prompt, answer) of one sequence; the answer alone is labelled."""
    ids, present, labels = (
        rows[name][place].tolist() for name in ("input_ids", "attention_mask", "labels")
    )
    size = sum(present)
    end = ids.index(EOT) + 1
    assert labels == [-100] * end + ids[end:size] + [-100] * (len(ids) - size)
    assert ids[size:] == [PAD_ID] * (len(ids) - size)
    return ids[:end], ids[end:size]


def test_a_forget_row_is_answer_then_refusal_of_one_prompt():
    rows = ready().sources["forget"].rows
    assert rows["input_ids"].dim() == 3 and rows["input_ids"].shape[:2] == (12, 2)
    for row in range(12):
        (prompt, answer) = words(rows, row, 0)
        (same, refusal) = words(rows, row, 1)
        assert prompt == same
        assert NULL not in answer and answer[-1] == EOS
        assert NULL in refusal


def test_prompts_are_those_of_the_alignment_data():
    ours = ready(n_forget=12, n_retain=8)
    theirs = ready(
        SyntheticAlignment,
        n_alignment=20,
        safe_share=0.4,
        n_harmful=12,
        batch_size=4,
        harmful_batch_size=4,
    )
    refused_and_kept = theirs.sources["alignment"].rows
    for row in range(12):
        assert words(ours.sources["forget"].rows, row, 1) == words(refused_and_kept, row)
        assert words(ours.sources["forget"].rows, row, 0) == words(
            theirs.sources["harmful"].rows, row
        )
    for row in range(8):
        assert words(ours.sources["retain"].rows, row) == words(refused_and_kept, 12 + row)
    assert torch.equal(ours.eval_rows["input_ids"], theirs.eval_rows["input_ids"])
    assert torch.equal(
        ours.probe_rows["harmful"]["input_ids"], theirs.probe_rows["harmful"]["input_ids"]
    )


def test_retain_prompts_are_answered_and_not_forgotten():
    data = ready()
    forgotten = {tuple(words(data.sources["forget"].rows, row, 0)[0]) for row in range(12)}
    kept = {tuple(words(data.sources["retain"].rows, row)[0]) for row in range(9)}
    assert len(forgotten) == 12 and len(kept) == 9 and not forgotten & kept
    assert all(NULL not in words(data.sources["retain"].rows, row)[1] for row in range(9))


def test_a_pass_pairs_forget_and_retain_rows_without_repeats():
    data = ready()
    for first in (0, 3, 6):
        batches = [
            {name: source.batch(first + k) for name, source in data.sources.items()}
            for k in range(3)
        ]
        assert sorted(torch.cat([b["forget"]["ids"] for b in batches]).tolist()) == list(range(12))
        assert sorted(torch.cat([b["retain"]["ids"] for b in batches]).tolist()) == list(range(9))
    orders = [
        torch.cat([data.sources["forget"].batch(first + k)["ids"] for k in range(3)]).tolist()
        for first in (0, 3)
    ]
    assert orders[0] != orders[1]


def test_forget_prompts_in_the_evaluation_set_are_refused():
    with pytest.raises(TemperError, match=r"data: \d+ forget prompts are also evaluation prompts"):
        ready(n_forget=400, n_retain=40, n_eval=100, eval_split="alignment")


def test_probe_rows_are_no_training_rows():
    data = ready()
    probe = {tuple(words(data.probe_rows["harmful"], row)[0]) for row in range(10)}
    assert not probe & {tuple(words(data.sources["forget"].rows, row, 0)[0]) for row in range(12)}
    assert len(prompt_keys(data.eval_prompts["unsafe"])) == 10


@pytest.mark.parametrize("flag", ["n_forget", "n_retain"])
def test_an_empty_stream_is_refused_by_name(flag: str):
    with pytest.raises(TemperError, match=rf"data\.init_args\.{flag}=0"):
        ready(**{flag: 0})


@pytest.mark.parametrize(
    ("flag", "value", "stream"), [("batch_size", 13, "forget"), ("retain_batch_size", 10, "retain")]
)
def test_a_batch_larger_than_its_stream_is_refused(flag: str, value: int, stream: str):
    with pytest.raises(TemperError, match=f"stream '{stream}' has"):
        ready(**{flag: value})
