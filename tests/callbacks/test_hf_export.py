"""The exported model is an ordinary Hugging Face folder."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from callbacks import HFExport
from tests.callbacks.runs import read_generations
from tests.errors import error_line


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


REFUSED = {
    ".": "not inside the run folder",
    "..": "names no folder of its own",
    "../elsewhere": "not inside the run folder",
    "checkpoints": "ModelCheckpoint writes to",
    "checkpoints/last": "ModelCheckpoint writes to",
    "tensorboard": "TensorBoardLogger writes to",
    "card.json": "named like the files that a run writes",
    "hpc_ckpt_1.ckpt": "named like the files that a run writes",
    "taken": "holds notes.txt",
    "linked": "a symbolic link",
    "{run}": "not inside the run folder",
    "{above}": "not inside the run folder",
    "{above}/other": "holds thesis.txt",
    "exports/a/b": "HFExport writes to",
}


@pytest.mark.parametrize("folder", REFUSED)
def test_a_folder_that_cannot_be_the_exports_is_refused(tmp_path, folder):
    run = tmp_path / "runs" / "mine"
    (run / "taken").mkdir(parents=True)
    (run / "taken" / "notes.txt").write_text("mine")
    (run / "linked").symlink_to("taken")
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "other" / "thesis.txt").write_text("mine")
    own = folder.format(run=run, above=tmp_path / "runs")
    export = HFExport(own)
    trainer = SimpleNamespace(
        default_root_dir=str(run),
        callbacks=[
            export,
            HFExport("exports/a"),
            SimpleNamespace(dirpath="s3://bucket/checkpoints"),
            ModelCheckpoint(run / "checkpoints"),
        ],
        loggers=[CSVLogger(run, "", ""), TensorBoardLogger(run, "tensorboard", "")],
    )
    module = SimpleNamespace(network=nn.Linear(1, 1))
    line = error_line(lambda: export.on_fit_start(trainer, module))
    assert line.startswith("HFExport.folder=") and REFUSED[folder] in line


def test_a_fit_that_would_replace_a_users_folder_never_starts(temper, tmp_path, capsys):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as left:
        temper("fit", tmp_path)
    assert left.value.code == 2
    assert "HFExport.folder=" in capsys.readouterr().err
    assert not (tmp_path / "metrics.csv").exists()
    assert (tmp_path / "export" / "notes.txt").read_text() == "mine"


def test_a_second_fit_replaces_its_own_export(temper, tmp_path):
    temper("fit", tmp_path)
    before = (tmp_path / "export" / "model.safetensors").read_bytes()
    temper("fit", tmp_path, "--model.init_args.optimizer.init_args.lr=0.1")
    assert (tmp_path / "export" / "model.safetensors").read_bytes() != before
