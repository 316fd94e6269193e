"""Unlearning data on the synthetic language: answers, refusals, and passes over the rows."""

import pytest
import torch

from datamodules import SyntheticAlignment
from datamodules.synthetic_unlearning import SyntheticUnlearning
from temper.errors import TemperError
from temper.synthetic.prompts import prompt_keys
from temper.synthetic.tokenizer import EOS, NULL
from tests.datamodules.rows import prompts_and_answers, ready


def unlearning(kind=SyntheticUnlearning, **changes):
    sizes = {
        "preset": "tiny",
        "n_forget": 12,
        "n_retain": 9,
        "batch_size": 4,
        "retain_batch_size": 3,
        "n_eval": 10,
        "seed": 3,
    }
    return ready(
        kind(
            **(
                sizes
                if kind is SyntheticUnlearning
                else {"preset": "tiny", "n_eval": 10, "seed": 3}
            )
            | changes
        )
    )


def test_a_forget_row_is_answer_then_refusal_of_one_prompt():
    rows = unlearning().sources["forget"].rows
    assert rows["input_ids"].dim() == 3 and rows["input_ids"].shape[:2] == (12, 2)
    for (prompt, answer), (same, refusal) in zip(
        prompts_and_answers(rows, 0), prompts_and_answers(rows, 1), strict=True
    ):
        assert prompt == same
        assert NULL not in answer and answer[-1] == EOS
        assert NULL in refusal


def test_prompts_are_those_of_the_alignment_data():
    ours = unlearning(n_forget=12, n_retain=8)
    theirs = unlearning(
        SyntheticAlignment,
        n_alignment=20,
        safe_share=0.4,
        n_harmful=12,
        batch_size=4,
        harmful_batch_size=4,
    )
    forget, retain = (ours.sources[name].rows for name in ("forget", "retain"))
    alignment, harmful = (theirs.sources[name].rows for name in ("alignment", "harmful"))
    refused_and_kept = prompts_and_answers(alignment)
    assert prompts_and_answers(forget, 1) + prompts_and_answers(retain) == refused_and_kept
    assert prompts_and_answers(forget, 0) == prompts_and_answers(harmful)
    assert torch.equal(ours.eval_rows["input_ids"], theirs.eval_rows["input_ids"])
    assert torch.equal(
        ours.probe_rows["harmful"]["input_ids"], theirs.probe_rows["harmful"]["input_ids"]
    )


def test_retain_prompts_are_answered_and_not_forgotten():
    data = unlearning()
    forgotten = {prompt for prompt, _ in prompts_and_answers(data.sources["forget"].rows, 0)}
    retained = prompts_and_answers(data.sources["retain"].rows)
    kept = {prompt for prompt, _ in retained}
    assert len(forgotten) == 12 and len(kept) == 9 and not forgotten & kept
    assert all(NULL not in answer for _, answer in retained)


def test_a_pass_pairs_forget_and_retain_rows_without_repeats():
    data = unlearning()
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
    with pytest.raises(TemperError, match=r"data: \d+ forget prompts .*eval_split='alignment'"):
        unlearning(n_forget=400, n_retain=40, n_eval=100, eval_split="alignment")


def test_probe_rows_are_no_training_rows():
    data = unlearning()
    probe = {prompt for prompt, _ in prompts_and_answers(data.probe_rows["harmful"])}
    forgotten = {prompt for prompt, _ in prompts_and_answers(data.sources["forget"].rows, 0)}
    assert len(forgotten) == 12 and not probe & forgotten
    assert len(prompt_keys(data.eval_prompts["unsafe"])) == 10


@pytest.mark.parametrize("flag", ["n_forget", "n_retain"])
def test_an_empty_stream_is_refused_by_name(flag: str):
    with pytest.raises(TemperError, match=rf"data\.init_args\.{flag}=0"):
        unlearning(**{flag: 0})


@pytest.mark.parametrize(
    ("flag", "value", "stream"), [("batch_size", 13, "forget"), ("retain_batch_size", 10, "retain")]
)
def test_a_batch_larger_than_its_stream_is_refused(flag: str, value: int, stream: str):
    with pytest.raises(TemperError, match=f"stream '{stream}' has"):
        unlearning(**{flag: value})
