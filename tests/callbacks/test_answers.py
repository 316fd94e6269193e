"""A prediction leaves its answers, whatever the judge, and nothing of a fit is touched."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import callbacks.answers
import callbacks.safety_steering
from callbacks import SaveAnswers
from callbacks.evaluation import EvaluationCallback
from tests.callbacks.runs import read_rows


@pytest.fixture(scope="module")
def predicted(temper, tiny_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("predicted")
    (folder / "config.yaml").write_text("of a fit")
    (folder / "metrics.csv").write_text("of a fit")
    words = ("--trainer.logger=false",)
    temper("predict", folder, *words, model=tiny_run / "export")
    return folder


def test_the_export_answers_what_the_network_in_memory_answered(predicted, tiny_run):
    rows = read_rows(predicted / "answers.jsonl")
    judged = read_rows(tiny_run / "generations.jsonl")
    assert [row["id"] for row in rows] == list(range(len(judged)))
    for name in ("id", "kind", "prompt", "response"):
        assert [row[name] for row in rows] == [row[name] for row in judged], name
    assert all(set(row) == {"id", "kind", "prompt", "response"} for row in rows), (
        "no judgement; the synthetic data leave what is right to their judge"
    )


def test_files_of_the_fit_stay(predicted):
    for name in ("config.yaml", "metrics.csv"):
        assert (predicted / name).read_text() == "of a fit"
    assert (predicted / "config_predict.yaml").is_file()
    assert not (predicted / "evaluation.json").exists()


class _Data:
    eval_kinds = ("unsafe", "task")

    def prompt_texts(self, batch):
        return [f"p{number}" for number in batch["ids"].tolist()]

    def correct(self, batch, answers):
        return [None if kind == 0 else True for kind in batch["kind"].tolist()]


def test_answers_of_all_ranks_are_in_order_with_correctness(monkeypatch, tmp_path, capsys):
    class Trainer:
        datamodule = _Data()
        default_root_dir = str(tmp_path)
        is_global_zero = True

    other = [{"id": 1, "kind": "task", "prompt": "p1", "response": "b", "correct": False}]
    monkeypatch.setattr(callbacks.answers, "gather_objects", lambda own: [own, other])
    saving = SaveAnswers()
    saving.on_predict_start(Trainer, None)
    batch = {"ids": torch.tensor([2, 0]), "kind": torch.tensor([1, 0])}
    saving.on_predict_batch_end(Trainer, None, ["c", "a"], batch, 0)
    saving.on_predict_end(Trainer, None)
    rows = read_rows(tmp_path / "answers.jsonl")
    assert [(row["id"], row["response"], row.get("correct")) for row in rows] == [
        (0, "a", None),
        (1, "b", False),
        (2, "c", True),
    ]
    assert "3 answers written to" in capsys.readouterr().out


def test_steering_acts_in_a_prediction_as_in_a_validation(temper, tiny_run, tmp_path, monkeypatch):
    steered: list[float] = []

    def add_steering(network, vectors, alpha):
        steered.append(alpha)
        return original(network, vectors, alpha)

    original = callbacks.safety_steering.add_steering
    monkeypatch.setattr(callbacks.safety_steering, "add_steering", add_steering)
    trainer = ("configs/trainer/cpu.yaml", "configs/trainer/steering.yaml")
    words = ("--trainer.callbacks.init_args.alpha=50", "--trainer.logger=false")
    for verb in ("validate", "predict"):
        temper(verb, tmp_path / verb, *words, model=tiny_run / "export", trainer=trainer)
    assert steered == [50, 50]
    said = [row["response"] for row in read_rows(tmp_path / "predict" / "answers.jsonl")]
    judged = [row["response"] for row in read_rows(tmp_path / "validate" / "generations.jsonl")]
    assert said == judged


@pytest.mark.parametrize(("limit", "warned"), [(1.0, True), (0, False)])
def test_a_fit_without_evaluation_warns_unless_switched_off(limit, warned):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        EvaluationCallback().on_fit_end(SimpleNamespace(limit_val_batches=limit), None)
    assert any("nothing was evaluated" in str(one.message) for one in found) is warned
