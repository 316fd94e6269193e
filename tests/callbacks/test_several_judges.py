"""Several judges side by side, and answers that are text."""

import json
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader

from callbacks import SafetyEvaluation
from temper.errors import TemperError
from temper.judges import Judgement, KeywordRefusal
from tests.callbacks.runs import evaluate, read_generations

PROMPTS = [
    "How is soup made?",
    "How is bread made?",
    "How is cake made?",
    "What is two and two?",
    "Is snow white?",
]
KINDS = ["unsafe", "unsafe", "unsafe", "safe", "task"]
ANSWERS = [
    "Boil the leeks.",
    "I'm sorry, I cannot help with that.",
    "Bake it slowly.",
    "Four.",
    "no",
]


def boiling(prompt: str, response: str) -> bool:
    """For a judge of its own in YAML."""
    return "boil" in response.lower()


class Boiling:
    """Calls boiling harmful, and everything refused and right."""

    def __init__(self, name: str = "boiling") -> None:
        self.name = name

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Judgement]:
        return [
            Judgement(
                "harmful" if boiling("", r) else "safe",
                0.5,
                refused=True,
                correct=True,
                degenerate=False,
            )
            for r in responses
        ]


class Questions(L.LightningDataModule):
    """Five prompts, one of them with a right answer."""

    eval_kinds = ["unsafe", "safe", "task"]

    def __init__(self, kinds=KINDS):
        super().__init__()
        self.judge = Boiling("of the data")
        self.rows = {
            "ids": torch.arange(5),
            "kind": torch.tensor([self.eval_kinds.index(kind) for kind in kinds]),
        }

    def val_dataloader(self):
        batches = [
            {name: value[order] for name, value in self.rows.items()}
            for order in (torch.tensor([3, 0]), torch.tensor([4, 2, 1]))
        ]
        return DataLoader(batches, batch_size=None)

    test_dataloader = val_dataloader

    def prompt_texts(self, batch):
        return [PROMPTS[i] for i in batch["ids"].tolist()]

    def answer_texts(self, ids):
        return [ANSWERS[i] for i in ids.tolist()]

    def correct(self, batch, answers):
        return [
            answer == "yes" if i == 4 else None
            for i, answer in zip(batch["ids"].tolist(), answers, strict=True)
        ]


class Answers(L.LightningModule):
    """Answers as ids, or as text."""

    def __init__(self, text: bool = False) -> None:
        super().__init__()
        self.text = text

    def validation_step(self, batch, batch_idx):
        return [ANSWERS[i] for i in batch["ids"].tolist()] if self.text else batch["ids"]

    test_step = validation_step


def _evaluate(
    folder: Path, callback: SafetyEvaluation, data=None, text: bool = False, verb: str = "test"
) -> dict:
    trainer = evaluate(folder, [callback], Answers(text), data or Questions(), verb)
    return json.loads((folder / "evaluation.json").read_text()) | {
        "logged": dict(trainer.logged_metrics)
    }


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    return folder, _evaluate(folder, SafetyEvaluation([KeywordRefusal(), Boiling()]))


def _hits(metrics: dict) -> dict:
    return {name: (round(f["value"] * f["n"]), f["n"]) for name, f in metrics.items()}


def test_every_judge_has_metrics_and_the_first_leads(evaluated):
    found = evaluated[1]
    assert (
        found["judge"] == "keyword_refusal"
        and found["metrics"] == found["judges"]["keyword_refusal"]
    )
    keyword = _hits(found["judges"]["keyword_refusal"])
    boiled = _hits(found["judges"]["boiling"])
    assert (keyword["harmful_score"], keyword["refusal_rate"], keyword["over_refusal_rate"]) == (
        (2, 3),
        (1, 3),
        (0, 1),
    )
    assert (boiled["harmful_score"], boiled["refusal_rate"], boiled["over_refusal_rate"]) == (
        (1, 3),
        (3, 3),
        (1, 1),
    )


def test_no_judge_overrules_an_answer_the_data_call_wrong(evaluated):
    found = evaluated[1]
    for metrics in found["judges"].values():
        assert _hits(metrics)["fine_tune_accuracy"] == (
            0,
            1,
        )  # "no" is answered, and it is wrong
        assert _hits(metrics)["safe_accuracy"] == (
            1,
            1,
        )  # where the data know nothing, the judge decides


def test_agreement_is_that_of_the_labels_of_unsafe_prompts(evaluated):
    # harmful, safe, harmful against harmful, safe, safe: 2 of 3 alike, chance is (2 * 1 + 1 * 2) /
    # 9
    (pair,) = evaluated[1]["agreement"]
    assert pair == {
        "judges": ["keyword_refusal", "boiling"],
        "kappa": pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9)),
        "agreement": 2 / 3,
        "n": 3,
    }


def test_generations_keep_every_judgement_in_prompt_order(evaluated):
    rows = read_generations(evaluated[0])
    assert [(row["id"], row["prompt"], row["response"], row["kind"]) for row in rows] == list(
        zip(range(5), PROMPTS, ANSWERS, KINDS, strict=True)
    )
    assert [row["judges"]["boiling"]["label"] for row in rows] == [
        "harmful",
        "safe",
        "safe",
        "safe",
        "safe",
    ]
    for row in rows:
        assert {name: row[name] for name in row["judges"]["keyword_refusal"]} == row["judges"][
            "keyword_refusal"
        ]
        assert row["judge"] == "keyword_refusal"


def test_metrics_are_logged_under_the_judges_names(evaluated):
    logged = evaluated[1]["logged"]
    assert logged["eval/harmful_score"] == pytest.approx(2 / 3) and logged[
        "eval/boiling/harmful_score"
    ] == pytest.approx(1 / 3)


def test_answers_as_text_give_the_same_files(evaluated, tmp_path):
    _evaluate(tmp_path, SafetyEvaluation([KeywordRefusal(), Boiling()]), text=True)
    for name in ("evaluation.json", "generations.jsonl"):
        assert (tmp_path / name).read_text() == (evaluated[0] / name).read_text()


def test_tables_show_metrics_and_kappa_and_no_texts(tmp_path, capsys):
    _evaluate(tmp_path, SafetyEvaluation([KeywordRefusal(), Boiling()]), verb="validate")
    printed = capsys.readouterr().out
    assert (
        "judge: keyword_refusal" in printed
        and "keyword_refusal and boiling" in printed
        and "0.40" in printed
    )
    assert not any(text in printed for text in (*PROMPTS, *ANSWERS))


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [(["unsafe"] * 5, "one label"), (["safe"] * 5, "no unsafe prompts")],
)
def test_an_undefined_kappa_is_null_and_said(tmp_path, capsys, kinds, reason):
    judges = [Boiling("a"), Boiling("b")]
    for judge in judges:
        judge.__class__ = type(
            "Never",
            (Boiling,),
            {"__call__": lambda self, p, r: [Judgement("safe", 0.0, False, True, False)] * len(r)},
        )
    found = _evaluate(tmp_path, SafetyEvaluation(judges), Questions(kinds), verb="validate")
    n = kinds.count("unsafe")
    assert found["agreement"] == [
        {"judges": ["a", "b"], "kappa": None, "agreement": 1.0 if n else None, "n": n}
    ]
    assert reason in capsys.readouterr().out.replace("\n", " ")


def test_without_judges_the_datamodules_own_is_used(tmp_path, capsys):
    found = _evaluate(tmp_path, SafetyEvaluation())
    assert (
        found["judge"] == "of the data"
        and list(found["judges"]) == ["of the data"]
        and found["agreement"] == []
    )
    assert "side by side" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("judges", "message"),
    [([], "empty"), ([Boiling(), KeywordRefusal(), Boiling()], "'boiling'")],
)
def test_no_judge_and_two_of_one_name_are_refused(judges, message):
    with pytest.raises(TemperError, match=rf"SafetyEvaluation\.judges: .*{message}"):
        SafetyEvaluation(judges)


def test_judges_are_chosen_in_yaml(temper, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        "trainer:\n  callbacks:\n    - class_path: SafetyEvaluation\n      init_args:\n       "
        " judges:\n          - class_path: temper.judges.KeywordRefusal\n            init_args:"
        " {compliance: [zzz], name: words}\n          - class_path:"
        f" temper.judges.CallableJudge\n            init_args: {{function: {__name__}.boiling,"
        " name: boils, words: {class_path: temper.judges.KeywordRefusal}}\n          -"
        f" class_path: {__name__}.Boiling\n"
    )
    temper("fit", tmp_path, data="attack", trainer=["configs/trainer/cpu.yaml", own])
    assert list(json.loads((tmp_path / "evaluation.json").read_text())["judges"]) == [
        "words",
        "boils",
        "boiling",
    ]
