"""A fabricated study folder: known metrics, no training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from temper.metrics.safety import wilson_interval
from temper.report.html import main
from temper.study.settings import Study

N = 200
Score = Callable[[str, str, float, int], float]


def _harmful_score(objective: str, attack: str, ratio: float, seed: int) -> float:
    """The method wins under the milder attack and not under the harder one."""
    slope = {
        ("sft", "mild"): 4.0,
        ("booster", "mild"): 2.0,
        ("sft", "hard"): 6.0,
        ("booster", "hard"): 5.9,
    }[objective, attack]
    return round(min(1.0, slope * ratio + 0.01 * seed), 3)


def proportion(value: float, n: int = N) -> dict[str, float]:
    hits = round(value * n)
    low, high = wilson_interval(hits, n)
    return {"value": hits / n, "ci_low": low, "ci_high": high, "n": n}


def _study_of(**changes: Any) -> dict[str, Any]:
    study: dict[str, Any] = {
        "name": "demo",
        "title": "SFT against Booster",
        "seeds": [0],
        "objectives": {"sft": {"label": "SFT"}, "booster": {"label": "Booster"}},
        "attacks": {
            "mild": {"label": "milder attack", "lr": 5.0e-5, "steps": 200},
            "hard": {"label": "harder attack", "lr": 1.0e-4, "steps": 200},
        },
        "harmful_ratios": [0, 0.05, 0.1],
        "headline": {"attack": "mild", "baseline": "sft", "method": "booster"},
    }
    return study | changes


def write_stage(folder: Path, metrics: dict[str, float], seed: int, seconds: float) -> None:
    folder.mkdir(parents=True)
    evaluation = {
        "judge": "grammar",
        "step": 200,
        "metrics": {name: proportion(value) for name, value in metrics.items()},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    cost = {
        "steps": 200,
        "passes": 600,
        "forwards": 0,
        "tokens": 1234567,
        "seconds": seconds,
        "peak_memory_mib": 512.5,
        "flops": 6 * 333 * 1234567,
    }
    card = {
        "objective": "BoosterModule",
        "data": "SyntheticAlignment",
        "cost": cost,
        "seed": seed,
        "devices": 1,
        "precision": "32-true",
        "parameters": 333,
        "data_sha256": {"alignment": "a" * 64, "eval": "b" * 64},
        "code": "0123abc",
        "versions": {"torch": "2.13.0", "python": "3.12.1"},
        "machine": {"platform": "Linux", "cpus": 2, "device": "cpu"},
    }
    (folder / "card.json").write_text(json.dumps(card))


def write_metrics(folder: Path, start: float, drop: float) -> None:
    """A sparse table as Lightning's CSVLogger leaves it."""
    lines = ["loss/user,probe/harmful_loss,step"]
    for step in range(0, 201, 20):
        lines += [f"1.5,,{step}", f",{max(0.1, start - drop * step):.4f},{step}"]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def _fabricate(
    root: Path, study: dict[str, Any] | None = None, score: Score = _harmful_score
) -> tuple[Path, Study]:
    study = study or _study_of()
    runs = root / study["name"]
    for seed in study["seeds"]:
        seeds_root = runs / f"seed{seed}"
        before = {
            "harmful_score": 0.9,
            "harmful_score_lenient": 0.95,
            "refusal_rate": 0.0,
            "over_refusal_rate": 0.0,
            "safe_accuracy": 0.97,
        }
        write_stage(seeds_root / "pretrain", before | {"degenerate_rate": 0.0}, seed, 10.0)
        (seeds_root / "pretrain" / "evaluation.json").unlink()
        write_stage(
            seeds_root / "instruct",
            before | {"degenerate_rate": 0.0, "asr/jb_co_task": 0.9},
            seed,
            12.0,
        )
        for objective in study["objectives"]:
            aligned = {
                "harmful_score": 0.01,
                "harmful_score_lenient": 0.02,
                "refusal_rate": 0.98,
                "over_refusal_rate": 0.03,
                "safe_accuracy": 0.96,
            }
            write_stage(
                seeds_root / "align" / objective,
                aligned | {"degenerate_rate": 0.01, "asr/jb_co_task": 0.3},
                seed,
                30.0,
            )
            for attack in study["attacks"]:
                for ratio in study["harmful_ratios"]:
                    strict = score(objective, attack, ratio, seed)
                    metrics = {
                        "harmful_score": strict,
                        "harmful_score_lenient": min(1.0, strict + 0.1),
                        "refusal_rate": 1 - strict,
                        "over_refusal_rate": 0.02,
                        "safe_accuracy": 0.94,
                        "fine_tune_accuracy": 0.88,
                        "degenerate_rate": 0.01,
                    }
                    folder = seeds_root / "attack" / objective / attack / f"p{ratio:g}"
                    write_stage(folder, metrics, seed, 20.0)
                    write_metrics(folder, 6.0 + seed, 0.02 if objective == "booster" else 0.04)
    (runs / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return runs, Study.of(study)


# Fixtures, not imports: other folders have a `conftest` too, so the name is ambiguous.


@pytest.fixture(scope="session")
def study_of() -> Callable[..., dict[str, Any]]:
    """A study's YAML, with changes."""
    return _study_of


@pytest.fixture(scope="session")
def harmful_score() -> Score:
    """The strict harmful score of an attacked stage, unless a test says another."""
    return _harmful_score


@pytest.fixture(scope="session")
def fabricate() -> Callable[..., tuple[Path, Study]]:
    """Write a study folder below a folder."""
    return _fabricate


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[..., tuple[Path, Study]]:
    """Write a study folder; ``score`` says the strict harmful score of every attacked stage."""

    def make(
        study: dict[str, Any] | None = None, score: Score = _harmful_score, name: str = "runs"
    ) -> tuple[Path, Study]:
        return _fabricate(tmp_path / name, study, score)

    return make


@pytest.fixture(scope="session")
def hostile_label() -> str:
    """A label that would break HTML, LaTeX and rich's markup if it were not escaped."""
    return '<script>alert("x")</script> $\\frac{1}$ & [red]50%'


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory, hostile_label: str) -> tuple[Path, Study]:
    """A study with labels that break formats unless escaped; read it, do not write to it."""
    study = _study_of(
        seeds=[0, 1], objectives={"sft": {"label": "SFT"}, "booster": {"label": hostile_label}}
    )
    runs, study = _fabricate(tmp_path_factory.mktemp("hostile"), study)
    assert main([str(runs)]) == 0
    return runs, study
