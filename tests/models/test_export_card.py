"""The model card of an export has settings, cost, data and metrics, and no paths or answers."""

import json
from pathlib import Path

import pytest
import yaml

from temper.models import NetworkSpec, ShapeSpec
from temper.models.card import FORMS, model_card, shorten_path

CONFIG = {
    "model": {
        "class_path": "lightning_modules.BoosterModule",
        "init_args": {
            "network": {"path": "/home/someone/models/base", "lora": {"rank": 8}, "compile": False},
            "lam": 5.0,
            "refresh_every": None,
            "optimizer": {
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": 0.001, "foreach": None, "amsgrad": False},
            },
        },
    },
    "data": {
        "class_path": "datamodules.TextAlignment",
        "init_args": {
            "train": "/home/someone/data/recipes.jsonl",
            "system": "a|b\nc",
            "files": ["/home/someone/x/y.csv"],
        },
    },
}
CARD = {
    "cost": {"steps": 1200, "tokens": 34567, "trained_tokens": 4567, "seconds": 12.5},
    "data_rows": {"alignment": 4000, "eval": 20},
    "data_sha256": {"alignment": "ab" * 32, "eval": "cd" * 32},
}
METRIC = {"value": 0.125, "ci_low": 0.05, "ci_high": 0.25, "n": 40}
SPEC = NetworkSpec(path="/home/someone/models/base")


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "card.json").write_text(json.dumps(CARD))
    (tmp_path / "evaluation.json").write_text(
        json.dumps({"judge": "keyword", "step": 1200, "metrics": {"harmful_score": METRIC}})
    )
    (tmp_path / "generations.jsonl").write_text(
        '{"prompt": "a question of the user", "response": "an answer of the model"}\n'
    )
    return tmp_path


def test_the_card_has_settings_cost_metrics_and_data_hashes(run):
    card = model_card(SPEC, "merged", run, step=1200)
    for line in (
        "| Objective | BoosterModule |",
        "| lam | 5.0 |",
        "| optimizer | AdamW |",
        "| optimizer.lr | 0.001 |",
        '| network.lora | {"rank": 8} |',
        "| steps | 1,200 |",
        "| tokens read in training | 34,567 |",
        "| tokens trained on | 4,567 |",
        "| seconds | 12.5 |",
        "| Data | TextAlignment |",
        f"| `alignment` | 4,000 rows, SHA-256 {'ab' * 8} |",
        "| harmful score | 12.5 | 5.0 to 25.0 | 40 |",
        "After 1,200 steps; judge: keyword.",
        FORMS["merged"],
    ):
        assert line in card
    assert "defensive research" in card and "torch 2" in card
    assert "refresh_every" not in card and "amsgrad" not in card and "compile" not in card, (
        "what says nothing is left out"
    )


def test_the_card_has_no_absolute_paths_and_no_generated_text(run):
    card = model_card(SPEC, "adapter", run, step=1200)
    assert "/home" not in card and "someone" not in card
    assert "models/base" in card and "data/recipes.jsonl" in card and '["x/y.csv"]' in card
    assert "question of the user" not in card and "an answer of the model" not in card


def test_special_characters_are_escaped_in_the_table(run):
    assert "| system | a\\|b c |" in model_card(SPEC, "whole", run, step=1200)


def test_evaluation_and_cost_of_other_weights_are_left_out(run):
    card = model_card(SPEC, "whole", run, step=600)
    assert "These weights were not evaluated" in card and "12.5" not in card
    assert "| steps | 600 |" in card and "1,200" not in card and "34,567" not in card


def test_a_run_folder_without_files_gives_a_card(tmp_path):
    card = model_card(
        NetworkSpec(shape=ShapeSpec(hidden_size=8, n_layers=2)), "whole", tmp_path, step=1
    )
    assert (
        "random weights (hidden size 8, 2 layers)" in card
        and "These weights were not evaluated" in card
    )
    assert "| steps | 1 |" in card


def test_without_training_the_card_has_no_training_section():
    card = model_card(SPEC, "merged")
    assert (
        "without further training" in card
        and "What was done" not in card
        and "Metrics\n" not in card
    )


def test_settings_that_greedy_evaluation_sets_aside_are_named():
    card = model_card(SPEC, "whole", note="A note.", decoding="It also has x=1.")
    assert f"{FORMS['whole']} A note." in card and "if it has one. It also has x=1." in card


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_loaded_in_the_precision_of_training(dtype):
    card = model_card(NetworkSpec(path="org/name", dtype=dtype), "adapter")
    assert f"from_pretrained(folder, dtype=torch.{dtype})" in card


@pytest.mark.parametrize(
    ("path", "form", "expected"),
    [
        ("org/name", "adapter", {"library_name": "peft", "base_model": "org/name"}),
        ("/home/someone/models/base", "whole", {"library_name": "transformers"}),
    ],
)
def test_the_front_matter_has_the_fields_of_the_hub(path, form, expected):
    front = yaml.safe_load(model_card(NetworkSpec(path=path), form).split("---")[1])
    assert {key: front[key] for key in ("library_name", "base_model") if key in front} == expected
    assert front["pipeline_tag"] == "text-generation"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a/b/c/d.json", "c/d.json"),
        ("runs/a", "runs/a"),
        ("a sentence", "a sentence"),
        ("/", "/"),
        ("", ""),
    ],
)
def test_absolute_paths_keep_their_last_two_components(text, expected):
    assert shorten_path(text) == expected
