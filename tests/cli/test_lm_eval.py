"""``train.py validate`` with configs/trainer/utility.yaml, as docs/evaluation.md has it."""

import json

import pytest

from callbacks.lm_eval import UTILITY
from tests.text import model_folder, write_lines

pytest.importorskip("lm_eval")
SETTINGS = [
    "configs/trainer/cpu.yaml",
    "configs/trainer/utility.yaml",
    "configs/objective/sft.yaml",
    "configs/data/text.yaml",
]


@pytest.fixture
def validate(command_line, tmp_path, monkeypatch):
    """Run the command on a small network that reads bytes; returns what it measured."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    model = model_folder(tmp_path / "model")
    train = write_lines(tmp_path / "train.jsonl", [{"prompt": "Say soup.", "completion": "soup"}])
    safe = write_lines(tmp_path / "safe.jsonl", [{"prompt": "Say tea."}])

    def run(*words: str) -> dict:
        command_line(
            "validate",
            *(f"--config={config}" for config in SETTINGS),
            f"--model.init_args.network.path={model}",
            f"--data.init_args.train={train}",
            f"--data.init_args.safe={safe}",
            f"--data.init_args.cache={tmp_path / 'cache'}",
            "--data.init_args.batch_size=1",
            "--data.init_args.max_new_tokens=2",
            f"--trainer.default_root_dir={tmp_path / 'run'}",
            *words,
        )
        return json.loads((tmp_path / "run" / UTILITY).read_text())

    return run


def test_the_documented_command_measures_with_an_adapter_too(validate, tmp_path, capsys):
    plain = validate()["tasks"]["colours"]
    assert plain["n"] == 20 and 0 <= plain["metrics"]["acc"]["value"] <= 1
    assert "colours" in capsys.readouterr().out and (tmp_path / "run" / "evaluation.json").exists()
    adapted = validate("--model.init_args.network.lora.rank=2")["tasks"]["colours"]
    assert adapted == plain, "a new adapter changes nothing yet"


def test_the_synthetic_language_is_refused_for_english_tasks(refused):
    pytest.importorskip(
        "datasets"
    ).disable_progress_bars()  # shown where the task's rows are not in the cache yet
    line = refused(verb="validate", trainer=SETTINGS[:2])
    assert line.startswith("UtilityEvaluation.tasks: in 20 of the first 20 rows of 'colours' ")
