"""The exported model is an ordinary Hugging Face folder."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from peft import AutoPeftModelForCausalLM
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
    "card.json": "named like what a run writes",
    "hpc_ckpt_1.ckpt": "named like what a run writes",
    ".hidden": "named like what a run writes",
    "validate": "named like what a run writes",
    "earlier.1/export": "named like what a run writes",
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


def test_checkpoints_in_the_run_folder_itself_are_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setattr("callbacks.hf_export.check_savable", lambda *_: None)
    export = HFExport()
    trainer = SimpleNamespace(
        default_root_dir=str(tmp_path / "run"),
        callbacks=[export, ModelCheckpoint(tmp_path / "run"), ModelCheckpoint(tmp_path)],
        loggers=[],
        datamodule=SimpleNamespace(tokenizer=None),
    )
    export.on_fit_start(trainer, SimpleNamespace(network=nn.Linear(1, 1)))


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


# -- adapters, and exports that fail

LORA = ("--model.init_args.network.lora.rank=2",)


def _export_config(folder: Path, *settings: dict[str, object]) -> Path:
    """A config whose callbacks are exports with these settings."""
    callbacks = [{"class_path": "HFExport", "init_args": dict(one)} for one in settings]
    path = folder / "own.yaml"
    path.write_text(json.dumps({"trainer": {"callbacks": callbacks}}))
    return path


def test_the_adapter_is_kept_beside_a_merged_export(temper, tiny_run, tmp_path):
    temper("fit", tmp_path / "run", *LORA, model=tiny_run / "export")
    files = {file.name for file in (tmp_path / "run" / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "all are the same, token for token" in card and "evaluation prompts" in card
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.allclose(alone(ids).logits, merged(ids).logits, atol=1e-5)


def test_a_run_of_all_weights_keeps_no_adapter(tiny_run):
    assert not (tiny_run / "adapter").exists()
    assert "Checked by greedy answers" in (tiny_run / "export" / "README.md").read_text()


def test_two_exports_keep_one_adapter(temper, tiny_run, tmp_path):
    own = _export_config(tmp_path, {}, {"folder": "small", "merge": False})
    run = tmp_path / "run"
    temper("fit", run, *LORA, f"--config={own}", model=tiny_run / "export")
    assert (run / "export" / "model.safetensors").exists()
    assert (run / "small" / "adapter_model.safetensors").exists()
    assert (run / "adapter" / "adapter_model.safetensors").exists()


def test_an_export_over_the_adapter_is_refused():
    assert "HFExport.adapter=x: the export goes there" in error_line(
        lambda: HFExport("x", adapter="x")
    )


class _DiskFull(OSError):
    """No space is left, from some point on."""


def _break(monkeypatch, where: str) -> None:
    def fail(*args, **kwargs):
        raise _DiskFull("No space left on device\nsecond line")

    monkeypatch.setattr(where, fail)


BREAKS = {
    "weights": "transformers.LlamaForCausalLM.save_pretrained",
    "merge": "peft.tuners.lora.LoraModel.merge_and_unload",
    "check": "temper.models.run_export.compare",
    "card": "temper.models.run_export.model_card",
}


@pytest.mark.parametrize(
    "part",
    ["merge", *(pytest.param(one, marks=pytest.mark.slow) for one in ("weights", "check", "card"))],
)
def test_an_export_that_fails_loses_nothing(
    temper, command_line, tiny_run, tmp_path, monkeypatch, capsys, part
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        _break(patch, BREAKS[part])
        with pytest.raises(SystemExit) as left:
            temper("fit", run, *LORA, model=tiny_run / "export")
    assert left.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "No space left on device" in line
    assert f"the adapter is in {run / 'adapter'}" in line and not (run / "export").exists()
    words = shlex.split(line.split("export again: temper ")[1])
    command_line(*words)
    again = AutoModelForCausalLM.from_pretrained(run / "export")
    kept = AutoPeftModelForCausalLM.from_pretrained(run / "adapter").merge_and_unload()
    state = kept.state_dict()
    assert all(torch.allclose(value, state[name]) for name, value in again.state_dict().items())


def test_an_export_of_all_weights_that_fails_leaves_a_checkpoint(
    temper, command_line, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        _break(patch, BREAKS["weights"])
        with pytest.raises(SystemExit):
            temper("fit", tmp_path)
    line = capsys.readouterr().err.splitlines()[-1]
    path = tmp_path / "checkpoints" / "unexported.ckpt"
    assert f"the checkpoint is {path}; export again: temper export --config" in line
    command_line(*shlex.split(line.split("export again: temper ")[1]))
    assert (tmp_path / "export" / "model.safetensors").exists()
    temper("fit", tmp_path)
    assert f"moved to {tmp_path / 'earlier.1'}" in capsys.readouterr().out
    assert not path.exists()


def test_the_command_that_exports_again_has_the_settings():
    export = HFExport(merge=False, dtype="float32", check=False, max_kl=0.5)
    flags = ["--merge=false", "--dtype=float32", "--check=false", "--max_kl=0.5"]
    assert list(export._as_flags()) == flags
    assert list(HFExport()._as_flags()) == []


def test_a_base_that_cannot_be_built_again_loses_nothing(temper, tmp_path, monkeypatch, capsys):
    """Sharded weights are gathered into a network that is built once more."""
    with monkeypatch.context() as patch:
        _break(patch, "callbacks.hf_export.whole_network")
        with pytest.raises(SystemExit) as left:
            temper("fit", tmp_path)
    line = capsys.readouterr().err.splitlines()[-1]
    assert left.value.code == 2 and "No space left on device; the checkpoint is" in line
    assert (tmp_path / "checkpoints" / "unexported.ckpt").exists()


def test_a_run_whose_export_failed_can_be_evaluated(
    temper, command_line, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        _break(patch, BREAKS["weights"])
        with pytest.raises(SystemExit):
            temper("fit", tmp_path)
    command_line("validate", f"--config={tmp_path / 'config.yaml'}")
    assert f"{tmp_path / 'checkpoints' / 'unexported.ckpt'}" in capsys.readouterr().err
    rows = [read_generations(folder) for folder in (tmp_path, tmp_path / "validate")]
    assert rows[0] == rows[1]


def test_a_checkpoint_that_is_there_is_named(temper, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        _break(patch, BREAKS["weights"])
        with pytest.raises(SystemExit):
            temper("fit", tmp_path, "--trainer.enable_checkpointing=true")
    line = capsys.readouterr().err.splitlines()[-1]
    assert "unexported" not in line and not (tmp_path / "checkpoints" / "unexported.ckpt").exists()
    named = Path(line.split("the checkpoint is ")[1].split(";")[0])
    assert named.exists() and named.parent == tmp_path / "checkpoints"


def test_all_ranks_agree_on_the_checkpoint_that_is_there(tmp_path):
    """Saving is collective, and the file may be on the first rank's machine alone."""
    of_first_rank = tmp_path / "elsewhere" / "last.ckpt"
    saver = SimpleNamespace(_last_checkpoint_saved=str(of_first_rank), _last_global_step_saved=3)
    asked = []
    trainer = SimpleNamespace(
        checkpoint_callbacks=[saver],
        global_step=3,
        strategy=SimpleNamespace(broadcast=lambda own: asked.append(own) or of_first_rank),
    )
    assert HFExport()._keep_checkpoint(trainer) == of_first_rank and asked == [None]


def test_a_disk_too_full_for_a_checkpoint_is_said(temper, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        _break(patch, BREAKS["weights"])
        _break(patch, "lightning.pytorch.Trainer.save_checkpoint")
        with pytest.raises(SystemExit):
            temper("fit", tmp_path)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "no checkpoint could be written (HFExport: _DiskFull: No space left on device)" in line


def test_what_merging_would_lose_is_refused_after_the_adapter_is_kept(
    temper, tiny_run, tmp_path, capsys
):
    own = _export_config(tmp_path, {"merge": True, "max_kl": 0.0})
    run = tmp_path / "run"
    words = (*LORA, f"--config={own}", "--model.init_args.network.dtype=bfloat16")
    with pytest.raises(SystemExit) as left:
        temper("fit", run, *words, model=tiny_run / "export")
    line = capsys.readouterr().err.splitlines()[-1]
    assert left.value.code == 2 and "set dtype=float32, merge=false, or max_kl=" in line
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert not (run / "export").exists()
