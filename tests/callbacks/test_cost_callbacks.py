"""Throughput and the run card: logged tokens, passes and hashes are those of the run."""

import csv
import json
import subprocess
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import callbacks.throughput
from datamodules import SyntheticInstruct

ROOT = Path(__file__).parents[2]


def _tokens(n_batches: int, seed: int = 0, first: int = 0) -> int:
    """Tokens that are no padding in batches of the tiny run, made anew."""
    data = SyntheticInstruct(preset="tiny", n_eval=4, batch_size=4, seed=seed)
    return sum(
        int((data.batch(number)["input_ids"] != data.tokenizer.pad_token_id).sum())
        for number in range(first, first + n_batches)
    )


def _trained(n_batches: int) -> int:
    """Tokens with a label in the first batches of the tiny run: those of the answers."""
    data = SyntheticInstruct(preset="tiny", n_eval=4, batch_size=4, seed=0)
    return sum(int((data.batch(n)["labels"] != -100).sum()) for n in range(n_batches))


def _column(folder: Path, name: str) -> list[float]:
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def _card(folder: Path) -> dict:
    return json.loads((folder / "card.json").read_text())


def test_throughput_is_tokens_per_second_since_last_reading(temper, tmp_path, monkeypatch):
    ticks = count()  # a clock that says one second later every time it is read
    monkeypatch.setattr(
        callbacks.throughput, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    )
    (tmp_path / "own.yaml").write_text(
        "trainer: {callbacks: [{class_path: Throughput, init_args: {every_n_steps: 2}}]}\n"
    )
    temper(
        "fit",
        tmp_path,
        "--trainer.max_steps=5",
        trainer=["configs/trainer/cpu.yaml", tmp_path / "own.yaml"],
    )
    # Lightning writes a logged value again with every step until there is a new one.
    assert list(dict.fromkeys(_column(tmp_path, "throughput/tokens_per_second"))) == [
        _tokens(2),
        _tokens(2, first=2),
    ]
    assert _column(tmp_path, "throughput/trained_tokens_per_second")[0] == _trained(2)
    assert all(memory > 50 for memory in _column(tmp_path, "throughput/peak_memory_mib"))


def test_the_card_counts_what_the_run_did(tiny_run):
    card = _card(tiny_run)
    n_parameters = sum(
        weight.numel() for weight in load_file(tiny_run / "export" / "model.safetensors").values()
    )
    cost = card["cost"]
    assert (cost["steps"], cost["passes"], cost["skipped_steps"], cost["tokens"]) == (
        2,
        2,
        0,
        _tokens(2),
    )
    assert 0 < cost["trained_tokens"] == _trained(2) < cost["tokens"]
    assert card["parameters"] == card["trainable_parameters"] == n_parameters
    assert cost["flops"] == 6 * n_parameters * _tokens(2)
    assert 0 < cost["seconds"] < 600 and cost["peak_memory_mib"] > 50


def test_sft_takes_one_pass_per_step_and_booster_three(temper, tmp_path):
    temper("fit", tmp_path / "sft", "--trainer.max_steps=3")
    temper(
        "fit",
        tmp_path / "booster",
        "--config=configs/objective/booster.yaml",
        "--trainer.max_steps=3",
        data="alignment",
    )
    passes = {name: _card(tmp_path / name)["cost"]["passes"] for name in ("sft", "booster")}
    assert passes == {"sft": 3, "booster": 9}


def test_the_card_says_what_the_run_was(tiny_run):
    card = _card(tiny_run)
    assert (card["objective"], card["data"], card["seed"], card["devices"]) == (
        "SFTModule",
        "SyntheticInstruct",
        0,
        1,
    )
    assert card["precision"] == "32-true" and card["machine"]["device"] == "cpu"
    assert card["versions"]["torch"] == torch.__version__
    assert "not installed" not in card["versions"].values()


def test_the_card_names_the_commit_of_the_code(temper, tmp_path):
    # Not the shared run's card: the tree may have been changed since.
    temper("fit", tmp_path)
    git = ["git", "-C", str(ROOT)]
    if subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True).returncode:
        assert _card(tmp_path)["code"].startswith("sha256:")
        return
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    changed = bool(
        subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        ).stdout.strip()
    )
    assert _card(tmp_path)["code"] == head + ("-modified" if changed else "")


def test_data_hashes_change_with_the_seed_alone(temper, tiny_run, tmp_path):
    temper("fit", tmp_path / "same")
    temper("fit", tmp_path / "other", "--data.init_args.seed=1", "--seed_everything=1")
    first, same, other = (
        _card(folder) for folder in (tiny_run, tmp_path / "same", tmp_path / "other")
    )
    assert set(first["data_sha256"]) == {"instruct", "eval"}
    assert same["data_sha256"] == first["data_sha256"]
    assert all(
        other["data_sha256"][name] != first["data_sha256"][name] for name in first["data_sha256"]
    )
    assert (first["seed"], other["seed"]) == (0, 1)


@pytest.mark.parametrize("data", ["attack", "alignment"])
def test_every_stream_of_the_data_has_a_hash(temper, tmp_path, data):
    temper("fit", tmp_path, data=data)
    streams = {"attack": {"user"}, "alignment": {"alignment", "harmful", "harmful_pairs"}}[data]
    assert set(_card(tmp_path)["data_sha256"]) == streams | {"eval"}
