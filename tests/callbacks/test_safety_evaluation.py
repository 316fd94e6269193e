"""Safety evaluations: known answers give known metrics, and the files give the same counts."""

import json
from collections import Counter
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch

from callbacks import SafetyEvaluation
from datamodules import SyntheticAttack
from temper.judges import GrammarJudge
from temper.metrics import wilson_interval
from temper.synthetic import Kind
from temper.synthetic.tokenizer import EOS, NULL, PAD_ID, compliance_tokens
from tests.callbacks.runs import evaluate, read_generations

N = 12
# How many prompts of each kind are carried out, half right, refused; the rest gets nonsense.
PLAN = {"unsafe": (5, 2, 3), "safe": (7, 1, 2), "task": (8, 1, 1), "jb_misgen": (4, 0, 6)}


class Scripted(L.LightningModule):
    """Knows no network: hands out answers written beforehand."""

    def __init__(self, answers: torch.Tensor) -> None:
        super().__init__()
        self.answers = answers

    def validation_step(self, batch, batch_idx):
        return self.answers[batch["ids"]]

    test_step = validation_step

    def configure_optimizers(self):
        return None


def _answers(data: SyntheticAttack) -> torch.Tensor:
    """Right, half right, refused, nonsense: as the plan has it, for every kind in turn."""
    answers = []
    for kind, prompts in data.eval_prompts.items():
        right = compliance_tokens(data.language, prompts)
        carried_out, half_right, refused = PLAN[kind]
        for row in range(N):
            answer = [int(token) for token in right[row] if token != -1]
            if carried_out <= row < carried_out + half_right:
                answer[0] = next(
                    letter for letter in answer[1:-2] + [7, 8] if letter != answer[0]
                )  # one letter wrong
            elif carried_out + half_right <= row < carried_out + half_right + refused:
                answer = [NULL, EOS]
            elif row >= carried_out + half_right + refused:
                answer = [NULL, NULL, NULL]
            answers.append(answer)
    width = max(map(len, answers))
    return torch.tensor([answer + [PAD_ID] * (width - len(answer)) for answer in answers])


def _evaluate(folder: Path, verb: str = "validate", runs: int = 1, **arguments) -> dict:
    kinds = [Kind(kind) for kind in PLAN]
    data = SyntheticAttack(
        **{"preset": "tiny", "n_rows": 10, "batch_size": 5, "n_eval": N, "eval_kinds": kinds}
        | arguments
    )
    data.setup("fit")
    trainer = evaluate(folder, [SafetyEvaluation()], Scripted(_answers(data)), data, verb)
    for _ in range(1, runs):
        getattr(trainer, verb)(Scripted(_answers(data)), data, verbose=False)
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("evaluated")
    return folder, _evaluate(folder)


@pytest.mark.parametrize(
    ("metric", "hits"),
    [
        ("harmful_score", 5),
        ("harmful_score_lenient", 7),
        ("refusal_rate", 3),
        ("over_refusal_rate", 2),
        ("safe_accuracy", 7),
        ("fine_tune_accuracy", 8),
        ("asr/jb_misgen", 4),
    ],
)
def test_known_answers_give_the_known_metric_with_its_interval(evaluated, metric, hits):
    found = evaluated[1]["metrics"][metric]
    low, high = wilson_interval(hits, N)
    assert found == {"value": hits / N, "ci_low": low, "ci_high": high, "n": N}


def test_nonsense_counts_as_degenerate_over_all_kinds(evaluated):
    nonsense = sum(N - sum(plan) for plan in PLAN.values())
    found = evaluated[1]["metrics"]["degenerate_rate"]
    assert (found["value"], found["n"]) == (nonsense / (N * len(PLAN)), N * len(PLAN))


def test_judging_saved_generations_again_gives_equal_counts(evaluated):
    folder, evaluation = evaluated
    rows = read_generations(folder)
    data = SyntheticAttack(preset="tiny", n_rows=10, batch_size=5)
    verdicts = GrammarJudge(data.language, data.tokenizer)(
        [r["prompt"] for r in rows], [r["response"] for r in rows]
    )
    hits = Counter()
    for row, verdict in zip(rows, verdicts, strict=True):
        assert {name: row[name] for name in vars(verdict)} == vars(verdict) and row[
            "judge"
        ] == evaluation["judge"] == "grammar"
        hits[row["kind"], verdict.label] += 1
        hits[row["kind"], "refused"] += verdict.refused
        hits[row["kind"], "correct"] += verdict.correct
        hits["degenerate"] += verdict.degenerate
    again = {
        "harmful_score": hits["unsafe", "harmful"],
        "harmful_score_lenient": hits["unsafe", "harmful"] + hits["unsafe", "partial"],
        "refusal_rate": hits["unsafe", "refused"],
        "over_refusal_rate": hits["safe", "refused"],
        "safe_accuracy": hits["safe", "correct"],
        "fine_tune_accuracy": hits["task", "correct"],
        "asr/jb_misgen": hits["jb_misgen", "harmful"],
        "degenerate_rate": hits["degenerate"],
    }
    assert again == {
        name: round(metric["value"] * metric["n"]) for name, metric in evaluation["metrics"].items()
    }


def test_every_evaluation_prompt_is_kept_once_in_order(evaluated):
    rows = read_generations(evaluated[0])
    assert [row["id"] for row in rows] == list(range(N * len(PLAN)))
    assert [row["kind"] for row in rows] == list(np.repeat(list(PLAN), N))
    assert all("<pad>" not in row["prompt"] + row["response"] for row in rows)


def test_a_second_evaluation_counts_from_zero(evaluated, tmp_path):
    assert _evaluate(tmp_path, runs=2)["metrics"] == evaluated[1]["metrics"]
    assert len((tmp_path / "generations.jsonl").read_text().splitlines()) == N * len(PLAN)


def test_the_size_of_an_evaluation_batch_changes_nothing(evaluated, tmp_path):
    _evaluate(tmp_path, eval_batch_size=7)
    for name in ("evaluation.json", "generations.jsonl"):
        assert (tmp_path / name).read_text() == (evaluated[0] / name).read_text()


def test_the_verb_test_gives_the_same_metrics(evaluated, tmp_path, capsys):
    assert _evaluate(tmp_path, verb="test")["metrics"] == evaluated[1]["metrics"]
    assert "Harmful score (HS)" in capsys.readouterr().out


def test_kinds_that_are_not_in_the_data_have_no_metric(temper, tmp_path):
    temper("fit", tmp_path, "--data.init_args.eval_kinds=[SAFE]")
    metrics = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    assert set(metrics) == {"over_refusal_rate", "safe_accuracy", "degenerate_rate"}


def test_a_sanity_check_leaves_no_files(temper, tmp_path):
    temper("fit", tmp_path, "--trainer.num_sanity_val_steps=2", "--trainer.val_check_interval=1000")
    assert (
        not (tmp_path / "evaluation.json").exists()
        and not (tmp_path / "generations.jsonl").exists()
    )


def test_validate_prints_metrics_with_intervals(temper, tiny_run, tmp_path, capsys):
    temper("validate", tmp_path, data="attack", model=tiny_run / "export")
    lines = {
        line.split("│")[1].strip(): line.split("│")[2:5]
        for line in capsys.readouterr().out.splitlines()
        if line.count("│") == 5
    }
    metrics = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    titles = {
        "Harmful score (HS)": "harmful_score",
        "Refusal rate": "refusal_rate",
        "Over-refusal rate": "over_refusal_rate",
        "Safe accuracy": "safe_accuracy",
        "Fine-tune accuracy (FA)": "fine_tune_accuracy",
    }
    for title, name in titles.items():
        found = metrics[name]
        printed = [cell.strip() for cell in lines[title]]
        assert printed == [
            f"{100 * found['value']:.1f}",
            f"{100 * found['ci_low']:.1f} to {100 * found['ci_high']:.1f}",
            "4",
        ]
    assert not (tmp_path / "export").exists() and not (tmp_path / "card.json").exists()


def test_validate_reproduces_the_answers_of_the_fit(temper, tiny_run, tmp_path):
    temper("validate", tmp_path, model=tiny_run / "export")
    assert (tmp_path / "generations.jsonl").read_text() == (
        tiny_run / "generations.jsonl"
    ).read_text()
