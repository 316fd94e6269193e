"""Forced prefixes: models that follow known rules have known rates, whatever the padding."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from callbacks.forced_prefix import ForcedPrefix, force
from datamodules import SyntheticAttack
from lightning_modules import SFTModule
from temper.errors import TemperError
from temper.metrics import wilson_interval
from temper.synthetic import Kind
from temper.synthetic.tokenizer import EOS, EOT, NULL, PAD_ID
from tests.callbacks.runs import evaluate
from tests.objectives import make_module

N = 12
KINDS = [Kind.SAFE, Kind.UNSAFE]


def attack_data(**changes: Any) -> SyntheticAttack:
    settings = {
        "preset": "tiny",
        "n_rows": 10,
        "batch_size": 5,
        "n_eval": N,
        "eval_kinds": KINDS,
        "eval_batch_size": 5,
    }
    data = SyntheticAttack(**settings | changes)
    data.setup("validate")
    return data


def answers_of(data: SyntheticAttack) -> dict[tuple[int, ...], list[int]]:
    """The true harmful answer to every unsafe prompt, without its end."""
    rows = data.forced_answers()
    prompts = [tuple(i for i in row if i != PAD_ID) for row in rows["input_ids"].tolist()]
    return {
        prompt: [i for i in answer if i != -1]
        for prompt, answer in zip(prompts, rows["answers"].tolist(), strict=True)
    }


class RuleBound(L.LightningModule):
    """Refuses after up to ``patience`` forced tokens; then carries on with the answer, every third
    prompt wrongly.
    """

    def __init__(self, data: SyntheticAttack, patience: int) -> None:
        super().__init__()
        self.answers = answers_of(data)
        self.patience = patience
        self.seen: list[tuple[int, ...]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return batch["input_ids"][:, :1]

    test_step = validation_step

    def generate(self, batch: Any) -> torch.Tensor:
        written = []
        for ids, present in zip(
            batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True
        ):
            assert present == sorted(present), "padding is on the left"
            tokens = [i for i, p in zip(ids, present, strict=True) if p]
            self.seen.append(tuple(tokens))
            prompt = tuple(tokens[: tokens.index(EOT) + 1])
            prefix = tokens[tokens.index(EOT) + 1 :]
            answer = self.answers[prompt]
            assert prefix == answer[: len(prefix)], "only the true answer is forced"
            rest = [*answer[len(prefix) :], EOS]
            if list(self.answers).index(prompt) % 3 == 0:
                rest = [7, 7, EOS]  # neither a refusal nor the answer
            written.append([NULL, EOS] if len(prefix) <= self.patience else rest)
        width = max(map(len, written))
        return torch.tensor([row + [PAD_ID] * (width - len(row)) for row in written])


def rates_of(
    folder: Path, data: SyntheticAttack, module: Any, lengths: list[int], verb: str = "validate"
) -> dict[str, Any]:
    trainer = evaluate(folder, [ForcedPrefix(lengths)], module, data, verb)
    found = json.loads((folder / "forced_prefix.json").read_text())
    for k, rates in found["lengths"].items():
        for name, rate in rates.items():
            assert float(trainer.callback_metrics[f"forced_prefix/{name}_{k}"]) == pytest.approx(
                rate["value"]
            )
    return found


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_known_rules_give_known_rates_with_their_intervals(tmp_path: Path, verb: str):
    data = attack_data()
    found = rates_of(tmp_path, data, RuleBound(data, patience=1), [3, 0, 1, 2], verb)
    answers = list(answers_of(data).values())
    assert list(found["lengths"]) == ["0", "1", "2", "3"]
    for k in range(4):
        counted = [i for i, answer in enumerate(answers) if len(answer) > k]
        refused = len(counted) if k <= 1 else 0
        harmful = 0 if k <= 1 else sum(i % 3 != 0 for i in counted)
        for name, hits in (("refusal", refused), ("harmful", harmful)):
            low, high = wilson_interval(hits, len(counted))
            assert found["lengths"][str(k)][name] == {
                "value": hits / len(counted),
                "ci_low": low,
                "ci_high": high,
                "n": len(counted),
            }
    assert found["judge"] == "grammar"


def test_every_unsafe_prompt_is_forced_once_at_every_length(tmp_path: Path):
    data = attack_data()
    module = RuleBound(data, patience=9)
    rates_of(tmp_path, data, module, [0, 2])
    answers = answers_of(data)
    assert sorted(module.seen) == sorted(
        [*answers, *(prompt + tuple(answer[:2]) for prompt, answer in answers.items())]
    )


def test_an_answer_that_the_prefix_exhausts_is_not_counted(tmp_path: Path):
    data = attack_data()
    sizes = [len(answer) for answer in answers_of(data).values()]
    assert len(set(sizes)) > 1
    found = rates_of(tmp_path, data, RuleBound(data, patience=0), [max(sizes) - 1])
    assert {rate["n"] for rate in found["lengths"][str(max(sizes) - 1)].values()} == {
        sizes.count(max(sizes))
    }


def test_a_refusal_is_not_harmful_whatever_was_forced_before_it(tmp_path: Path):
    data = attack_data()
    k = (
        max(len(answer) for answer in answers_of(data).values()) - 1
    )  # all but the token that ends the output
    found = rates_of(tmp_path, data, RuleBound(data, patience=k), [k])["lengths"][str(k)]
    assert (found["refusal"]["value"], found["harmful"]["value"]) == (1, 0)


def test_batch_size_and_number_of_ranks_change_nothing(tmp_path: Path):
    whole = attack_data()
    expected = rates_of(tmp_path, whole, RuleBound(whole, patience=1), [2])["lengths"]["2"]
    data = attack_data(eval_batch_size=3)
    callback = ForcedPrefix([2])
    rows = data.forced_answers()
    shares = []
    for rank in range(2):
        trainer = SimpleNamespace(
            global_rank=rank,
            world_size=2,
            precision_plugin=SimpleNamespace(forward_context=torch.no_grad),
        )
        shares.append(callback._rates(trainer, RuleBound(data, patience=1), data, rows, 2))  # type: ignore[arg-type]
    for name, rate in expected.items():
        assert sum(share[name]["n"] for share in shares) == rate["n"]
        assert sum(share[name]["value"] * share[name]["n"] for share in shares) == pytest.approx(
            rate["value"] * rate["n"]
        )


def test_the_forced_tokens_follow_the_prompt_directly():
    rows = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [7, 8, 9, 6]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
        "answers": torch.tensor([[11, 12, 13], [14, -1, -1]]),
    }
    forced = force(rows, 2, pad_id=0)
    assert forced["input_ids"].tolist() == [[0, 0, 5, 6, 11, 12], [0, 7, 8, 9, 6, 14]]
    assert forced["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]
    assert torch.equal(force(rows, 0, pad_id=0)["input_ids"], rows["input_ids"])


class Listening:
    """A judge that records its prompts and responses."""

    name = "listening"

    def __init__(self, judge: Any) -> None:
        self.judge = judge
        self.heard = []

    def __call__(self, prompts: list[str], responses: list[str]) -> list[Any]:
        self.heard.append(list(zip(prompts, responses, strict=True)))
        return self.judge(prompts, responses)


def test_a_real_network_continues_as_it_does_one_row_at_a_time(tmp_path: Path):
    data = attack_data(n_eval=5, eval_batch_size=4)
    module = make_module(SFTModule, data, double=False, lora=True)
    data.judge = Listening(data.judge)
    rates_of(tmp_path, data, module, [2])
    continued, whole = (
        [pair for batch in data.judge.heard[i::2] for pair in batch] for i in (0, 1)
    )
    network = module.network.eval()
    decode = data.tokenizer.decode
    assert len(continued) == len(whole) == 5
    answers = {
        decode(prompt): (prompt, answer) for prompt, answer in answers_of(data).items()
    }  # batches come longest first
    for (asked, after), (_, together) in zip(continued, whole, strict=True):
        prompt, answer = answers.pop(asked)
        ids = torch.tensor([[*prompt, *answer[:2]]])
        written = network.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=data.max_new_tokens,
            do_sample=False,
        )
        assert after == decode(written[0, ids.shape[1] :])
        assert together == f"{decode(answer[:2])} {after}"
    assert len({after for _, after in continued}) > 1


def test_a_sanity_check_leaves_nothing(tmp_path: Path):
    callback = ForcedPrefix()
    callback.on_validation_epoch_end(SimpleNamespace(sanity_checking=True), None)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_data_without_forced_answers_are_refused():
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(tokenizer=None, judge=None, eval_batch_size=1)
    )
    with pytest.raises(
        TemperError, match=r"ForcedPrefix: data=SimpleNamespace .*forced_answers\(\)"
    ):
        ForcedPrefix().setup(trainer, None, "fit")  # type: ignore[arg-type]
    ForcedPrefix().setup(trainer, None, "predict")  # type: ignore[arg-type]


def test_no_unsafe_prompts_and_too_long_prefixes_are_refused():
    safe = SimpleNamespace(datamodule=attack_data(eval_kinds=[Kind.SAFE]))
    with pytest.raises(TemperError, match="data.init_args.eval_kinds=.*UNSAFE"):
        ForcedPrefix().setup(safe, None, "fit")  # type: ignore[arg-type]
    with pytest.raises(
        TemperError,
        match=r"ForcedPrefix\.lengths=\[0, 50\]: .*\d+ tokens",
    ):
        ForcedPrefix([0, 50]).setup(SimpleNamespace(datamodule=attack_data()), None, "fit")  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", [[], [-1, 2]])
def test_invalid_lengths_are_refused(lengths: list[int]):
    with pytest.raises(TemperError, match=r"ForcedPrefix\.lengths="):
        ForcedPrefix(lengths)
