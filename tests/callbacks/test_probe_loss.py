"""The loss on held-out harmful rows: before training, every n steps, and after the last one."""

import csv
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from datamodules import SyntheticAttack
from temper.models import NetworkSpec, ShapeSpec, build_network

TINY = ShapeSpec(
    hidden_size=64, n_layers=3, n_heads=4, intermediate_size=160
)  # configs/model/tiny.yaml


def _readings(folder: Path) -> dict[int, float]:
    with open(folder / "metrics.csv", newline="") as file:
        return {
            int(row["step"]): float(row["probe/harmful_loss"])
            for row in csv.DictReader(file)
            if row["probe/harmful_loss"]
        }


@torch.no_grad()
def _loss_by_hand(network: torch.nn.Module) -> float:
    """Mean of -log p over the answers' tokens, one row and one token at a time."""
    data = SyntheticAttack(preset="tiny", n_eval=4, n_rows=10, batch_size=5)
    data.setup("fit")
    rows = data.probe_rows["harmful"]
    terms = []
    for ids, labels, present in zip(
        rows["input_ids"], rows["labels"], rows["attention_mask"], strict=True
    ):
        size = int(present.sum())
        logps = network.eval()(input_ids=ids[None, :size]).logits[0].double().log_softmax(-1)
        terms += [-float(logps[t - 1, labels[t]]) for t in range(1, size) if labels[t] != -100]
    return sum(terms) / len(terms)


@pytest.fixture(scope="module")
def probed(temper, tmp_path_factory) -> Path:
    # Two batches to an epoch, so that five steps are two and a half epochs.
    folder = tmp_path_factory.mktemp("probed")
    (folder / "own.yaml").write_text(
        "trainer: {callbacks+: [{class_path: ProbeLoss, init_args: {every_n_steps: 3}}]}\n"
    )
    temper(
        "fit",
        folder,
        "--trainer.max_steps=5",
        data="attack",
        trainer=["configs/trainer/cpu.yaml", folder / "own.yaml"],
    )
    return folder


def test_it_is_measured_every_n_steps_and_after_the_last(probed):
    assert list(_readings(probed)) == [0, 3, 5]


def test_the_first_reading_is_the_loss_before_training(probed):
    data = SyntheticAttack(preset="tiny", n_eval=4, n_rows=10, batch_size=5)
    network = build_network(NetworkSpec(shape=TINY), data.tokenizer)
    assert _readings(probed)[0] == pytest.approx(_loss_by_hand(network), rel=1e-5)


def test_the_last_reading_is_the_loss_of_the_exported_model(probed):
    network = AutoModelForCausalLM.from_pretrained(probed / "export")
    assert _readings(probed)[5] == pytest.approx(_loss_by_hand(network), rel=1e-5)
    assert _readings(probed)[5] != pytest.approx(_readings(probed)[0], rel=1e-4)


def test_measuring_it_does_not_change_training(temper, probed, tmp_path):
    temper("fit", tmp_path, "--trainer.max_steps=5", data="attack")
    weights = [folder / "export" / "model.safetensors" for folder in (probed, tmp_path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_shipped_config_adds_it_to_the_other_callbacks(temper, tmp_path):
    temper(
        "fit",
        tmp_path,
        data="attack",
        trainer=["configs/trainer/cpu.yaml", "configs/trainer/probe.yaml"],
    )
    assert list(_readings(tmp_path)) == [0, 2]
    assert (tmp_path / "export" / "config.json").exists()
