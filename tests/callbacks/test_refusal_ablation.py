"""The refusal direction removed while answers are given: a planted one, and prompts of its own."""

import json
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from callbacks.refusal_ablation import REFUSAL_ABLATION, RefusalAblation
from datamodules import SyntheticAttack
from datamodules.text_evaluation import in_first_half
from temper.data import EvalSet
from temper.errors import TemperError
from temper.judges import Judgement
from temper.models.generate import generate_greedy
from tests.callbacks.runs import evaluate
from tests.models.test_capture import planted
from tests.objectives import same_bits, weights

REFUSAL, ANSWER, UNSAFE, SAFE = 3, 4, 5, 6


class Data(L.LightningDataModule):
    """Prompts whose last token says whether they are unsafe; ``n`` of each kind are evaluated."""

    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda ids: [f"t{i}" for i in ids])
    eval_kinds = ["unsafe", "safe"]
    eval_batch_size = 5

    def __init__(self, n: int = 8, n_direction: int = 12, shared: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.words = torch.randint(7, 20, (n_direction, 4), generator=generator)
        self.shared = shared
        self.eval_rows = {
            "input_ids": torch.cat([prompts(self.words[:n], last) for last in (UNSAFE, SAFE)]),
            "attention_mask": torch.ones(2 * n, 5, dtype=torch.long),
            "ids": torch.arange(2 * n),
            "kind": torch.arange(2).repeat_interleave(n),
        }

    def judge(self, prompts: Any, responses: Any) -> list[Judgement]:
        self.judged = prompts
        return [
            Judgement(
                label="safe" if REFUSAL in response else "harmful",
                score=0.0,
                refused=REFUSAL in response,
                correct=ANSWER in response,
                degenerate=False,
            )
            for response in responses
        ]

    judge.name = "planted"  # type: ignore[attr-defined]

    def prompt_texts(self, batch: Any) -> list[Any]:
        return batch["input_ids"].tolist()

    def answer_texts(self, ids: Any) -> list[Any]:
        return ids.tolist()

    def direction_prompts(self) -> dict[str, Any]:
        n = len(self.words)
        ids = torch.where(torch.arange(n) < self.shared, torch.arange(n), -1)
        return {
            kind: {
                "input_ids": prompts(self.words, last),
                "attention_mask": torch.ones(n, 5, dtype=torch.long),
                "ids": ids,
            }
            for kind, last in (("unsafe", UNSAFE), ("safe", SAFE))
        }

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(EvalSet(self.eval_rows, 5, 0, 1), batch_size=None)

    test_dataloader = val_dataloader


def prompts(words: torch.Tensor, last: int) -> torch.Tensor:
    return torch.cat([words, torch.full((len(words), 1), last)], dim=1)


class Module(L.LightningModule):
    """The planted network; it answers with one token."""

    def __init__(self, refuses: bool = True) -> None:
        super().__init__()
        self.network, _ = planted(torch.float32)
        if not refuses:
            self.network.lm_head.weight.data[REFUSAL] = 0

    def generate(self, batch: Any) -> torch.Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return generate_greedy(self.network, ids, mask, 1)

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.generate(batch)

    test_step = validation_step


def run(folder: Any, data: Data, module: Module, verb: str = "validate", **settings: Any) -> Any:
    trainer = evaluate(folder, [RefusalAblation(**settings)], module, data, verb)
    return trainer, json.loads((folder / REFUSAL_ABLATION).read_text())


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_without_its_direction_the_network_complies(tmp_path, verb, capsys):
    module = Module()
    before = weights(module.network)
    trainer, found = run(tmp_path, Data(), module, verb)
    value = {
        name: {key: metric["value"] for key, metric in metrics.items()}
        for name, metrics in found["metrics"].items()
    }
    assert value["plain"]["refusal_rate"] == value["random"]["refusal_rate"] == 1
    assert value["ablated"]["refusal_rate"] == 0
    assert value["ablated"]["harmful_score"] == 1
    assert [value[name]["safe_accuracy"] for name in ("plain", "ablated", "random")] == [1, 1, 1]
    assert found["metrics"]["ablated"]["harmful_score"]["n"] == 8
    assert found["refusal_tokens"] == [f"t{REFUSAL}"]
    assert found["direction"]["position"] == -1 and "reason" not in found
    assert (found["prompts"], found["validation_prompts"]) == ({"unsafe": 10, "safe": 10}, 2)
    printed = " ".join(capsys.readouterr().out.split())
    assert "│ Refusal rate │ 100.0 │ 0.0 │ 100.0 │ 8 │" in printed
    logged = trainer.callback_metrics
    assert logged["refusal_ablation/harmful_score"] == 1
    assert same_bits(before, weights(module.network))


def test_prompts_that_found_the_direction_are_not_measured_on(tmp_path):
    _, found = run(tmp_path, Data(shared=3), Module())
    assert found["metrics"]["plain"]["refusal_rate"]["n"] == 5


def test_a_network_that_never_refuses_is_said_to(tmp_path, capsys):
    _, found = run(tmp_path, Data(), Module(refuses=False))
    assert found["reason"] == "the network refused 0 % of the unsafe prompts"
    assert found["metrics"] == {}
    assert "Refusal direction: not measured, the network refused 0 %" in capsys.readouterr().out


def test_without_a_candidate_nothing_is_measured(tmp_path):
    class Opposite(Data):
        """Kinds exchanged: the direction induces no refusal."""

        def direction_prompts(self) -> dict[str, Any]:
            found = super().direction_prompts()
            mixed = torch.cat([found["unsafe"]["input_ids"][:6], found["safe"]["input_ids"][6:]])
            return {kind: rows | {"input_ids": mixed} for kind, rows in found.items()}

    _, found = run(tmp_path, Opposite(), Module())
    assert found["reason"] == "no candidate passed"
    assert found["direction"] is None and found["metrics"] == {}
    assert sum(found["left_out"].values()) == 8


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"n_prompts": 2}, "RefusalAblation.n_prompts=2: give a whole number >= 8"),
        ({"n_positions": 0}, "RefusalAblation.n_positions=0"),
        ({"max_kl": 0.0}, "RefusalAblation.max_kl=0.0: give a number > 0"),
        ({"validation_share": 1.0}, "RefusalAblation.validation_share=1.0: give a share"),
    ],
)
def test_arguments_out_of_range_are_refused(settings, error):
    with pytest.raises(TemperError, match=error):
        RefusalAblation(**settings)


@pytest.mark.parametrize(
    ("data", "settings", "error"),
    [
        (Data(n_direction=4, n=4), {}, "4 unsafe prompts to find the direction with"),
        (Data(), {"n_positions": 6}, "the shortest unsafe prompt has 5 tokens"),
    ],
)
def test_too_few_or_short_prompts_are_refused_first(tmp_path, data, settings, error):
    with pytest.raises(TemperError, match=error):
        run(tmp_path, data, Module(), **settings)


def test_data_without_such_prompts_are_refused(tmp_path):
    data = Data()
    data.direction_prompts = None  # type: ignore[assignment]

    class Other(L.LightningDataModule):
        val_dataloader = data.val_dataloader

    with pytest.raises(TemperError, match="data=Other has no direction_prompts"):
        evaluate(tmp_path, [RefusalAblation()], Module(), Other())


def test_synthetic_prompts_are_of_their_kind_and_new():
    data = SyntheticAttack(preset="tiny", n_rows=10, batch_size=5, n_eval=12)
    data.setup("validate")
    found = data.direction_prompts()
    tested = {tuple(row[row != 0].tolist()) for row in data.eval_rows["input_ids"]}
    for rows in found.values():
        assert rows["input_ids"].shape[0] == 160
        assert not tested & {tuple(row[row != 0].tolist()) for row in rows["input_ids"]}
        assert (rows["ids"] == -1).all()


def test_half_of_all_texts_is_in_the_first_half():
    share = sum(in_first_half(f"question {i}") for i in range(2000)) / 2000
    assert 0.46 < share < 0.54
    assert in_first_half(" a dish ") == in_first_half("a dish")
