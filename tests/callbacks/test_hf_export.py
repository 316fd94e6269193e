"""The exported model is an ordinary Hugging Face folder."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.callbacks.runs import read_generations


def _continue(folder, prompts: list[str], n_tokens: int) -> list[str]:
    """Greedy answers with plain transformers, nothing of this project."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        ids = network.generate(**batch, max_new_tokens=n_tokens, do_sample=False)[
            :, batch["input_ids"].shape[1] :
        ]
    return [
        " ".join(tokenizer.convert_ids_to_tokens([i for i in row if i != tokenizer.pad_token_id]))
        for row in ids.tolist()
    ]


def test_plain_transformers_answers_as_the_run_did(temper, tmp_path):
    temper("fit", tmp_path, "--trainer.max_steps=10", "--trainer.val_check_interval=10")
    rows = read_generations(tmp_path)
    answers = _continue(tmp_path / "export", [row["prompt"] for row in rows], n_tokens=7)
    assert answers == [row["response"] for row in rows]
    assert len(set(answers)) > 1 and all(answers)


def test_a_run_that_starts_from_an_export_begins_where_it_ended(temper, tiny_run, tmp_path):
    temper("fit", tmp_path, "--model.init_args.optimizer.init_args.lr=0", model=tiny_run / "export")
    weights = [folder / "export" / "model.safetensors" for folder in (tiny_run, tmp_path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_folder_can_be_chosen_and_lies_in_the_run_folder(temper, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "trainer: {callbacks: [{class_path: HFExport, init_args: {folder: models/last}}]}\n"
    )
    temper("fit", tmp_path, trainer=["configs/trainer/cpu.yaml", tmp_path / "own.yaml"])
    assert (tmp_path / "models" / "last" / "config.json").exists() and not (
        tmp_path / "export"
    ).exists()
