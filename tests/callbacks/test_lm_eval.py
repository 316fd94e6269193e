"""lm-evaluation-harness on the network in memory, on local tasks, without a hub."""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from callbacks import UtilityEvaluation
from callbacks.lm_eval import read_metrics
from temper.errors import TemperError
from temper.synthetic import build_tokenizer, language_spec
from tests.callbacks.runs import evaluate

ROOT = Path(__file__).parents[2]
COLOURS = [
    json.loads(line) for line in (ROOT / "configs/lm_eval/colours.jsonl").read_text().splitlines()
]


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE({token: i for i, token in enumerate([*alphabet, "<pad>", "<eos>"])}, [])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


class Module(L.LightningModule):
    """A network, and nothing to validate."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=258,
            initializer_range=0.5,
            max_position_embeddings=256,
            pad_token_id=256,
            bos_token_id=None,
            eos_token_id=257,
        )
        self.network = LlamaForCausalLM(config)

    def validation_step(self, batch, batch_idx):
        return None

    test_step = validation_step


class Data(L.LightningDataModule):
    """A tokenizer."""

    tokenizer = _tokenizer()

    def val_dataloader(self):
        return DataLoader([0])

    test_dataloader = val_dataloader


def _run(folder: Path, callback: UtilityEvaluation, verb: str = "validate") -> tuple[dict, dict]:
    trainer = evaluate(folder, [callback], Module(), Data(), verb)
    return json.loads((folder / "utility.json").read_text()), dict(trainer.logged_metrics)


@pytest.fixture
def in_root(monkeypatch, tmp_path):
    """The example's data file is named from the project's root; what datasets keeps goes
    elsewhere.
    """
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def _right(module: Module, row: dict) -> bool:
    """Whether the right colour is the likeliest continuation: sums of log-probabilities, one
    sequence at a time.
    """
    question = _tokenizer()(f"Question: {row['question']}\nAnswer:")["input_ids"]
    sums = []
    for choice in row["choices"]:
        answer = _tokenizer()(f" {choice}")["input_ids"]
        with torch.no_grad():
            logps = (
                module.network(torch.tensor([question + answer]))
                .logits[0, len(question) - 1 : -1]
                .log_softmax(-1)
            )
        sums.append(float(logps[range(len(answer)), answer].sum()))
    return sums.index(max(sums)) == row["answer"]


def test_accuracy_of_the_example_task_matches_a_plain_loop(in_root, tmp_path, capsys):
    found, logged = _run(tmp_path, UtilityEvaluation(["colours"], "configs/lm_eval"))
    hits = [_right(Module(), row) for row in COLOURS]
    assert 0 < sum(hits) < len(hits) == 20
    task = found["tasks"]["colours"]
    assert (
        task["metrics"]["acc"]["value"]
        == np.mean(hits)
        == pytest.approx(float(logged["utility/colours/acc"]))
    )
    assert task["metrics"]["acc"]["stderr"] == pytest.approx(np.std(hits, ddof=1) / 20**0.5)
    assert (task["n"], task["n_shot"], found["step"], found["limit"]) == (20, 0, 0, None)
    assert f"{np.mean(hits):.3f}" in capsys.readouterr().out


def test_settings_reach_the_harness_and_a_group_has_its_parts(in_root, tmp_path):
    rows = {"colours": COLOURS[:5], "more": COLOURS[5:15]}
    for name, part in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        text = (
            (ROOT / "configs/lm_eval/colours.yaml")
            .read_text()
            .replace("configs/lm_eval/colours.jsonl", str(tmp_path / f"{name}.jsonl"))
        )
        text = text.replace("task: colours", f"task: {name}") + "fewshot_split: test\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    aggregate = "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
    (tmp_path / "both.yaml").write_text(f"group: both\ntask: [colours, more]\n{aggregate}")
    found, logged = _run(
        tmp_path, UtilityEvaluation(["both"], str(tmp_path), limit=4, num_fewshot=2), verb="test"
    )
    assert set(found["tasks"]) == {"both", "colours", "more"} and set(logged) == {
        "utility/both/acc"
    }
    parts = [found["tasks"][name] for name in ("colours", "more")]
    assert [(part["n"], part["n_shot"]) for part in parts] == [(4, 2), (4, 2)]
    assert found["tasks"]["both"]["metrics"]["acc"]["value"] == pytest.approx(
        np.mean([part["metrics"]["acc"]["value"] for part in parts])
    )


def test_evaluation_leaves_weights_modes_and_rng_alone(in_root, tmp_path):
    module = Module().train()
    module.network.model.layers[0].eval()
    before = {
        name: (id(p), p.detach().clone(), p.requires_grad) for name, p in module.named_parameters()
    }
    modes = [part.training for part in module.modules()]
    draws = []
    for callbacks in ([], [UtilityEvaluation(["colours"], "configs/lm_eval", limit=2)]):
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        evaluate(tmp_path, callbacks, module, Data())
        draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]
    assert [part.training for part in module.modules()] == modes
    for name, parameter in module.named_parameters():
        identity, value, trained = before[name]
        assert (
            id(parameter) == identity
            and torch.equal(parameter, value)
            and parameter.requires_grad == trained
        )


def test_metrics_are_read_with_their_filters_and_errors():
    said = {
        "alias": "sums",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "bypass,none": "N/A",
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": "N/A",
        "exact_match,flexible-extract": 1,
    }
    assert read_metrics(said) == {
        "acc": {"value": 0.5, "stderr": 0.1},
        "exact_match/strict-match": {"value": 0.25, "stderr": None},
        "exact_match/flexible-extract": {"value": 1.0, "stderr": None},
    }


def _setup(callback: UtilityEvaluation, network: bool = True, stage: str = "fit") -> None:
    trainer = SimpleNamespace(is_global_zero=True, strategy=None, datamodule=Data())
    callback.setup(trainer, Module() if network else L.LightningModule(), stage)


def test_an_unknown_task_is_refused_with_a_guess(in_root, monkeypatch):
    class FewTasks:  # to read all of the harness's own takes half a minute
        def __init__(self, include_path=None, include_defaults=True):
            self.all_tasks = ["winogrande", "gsm8k"] if include_defaults else []

    monkeypatch.setattr("lm_eval.tasks.TaskManager", FewTasks)
    with pytest.raises(
        TemperError,
        match=r"UtilityEvaluation\.tasks: .*'gsm8'.*'gsm8k'",
    ):
        _setup(UtilityEvaluation(["winogrande", "gsm8"], "configs/lm_eval"))
    _setup(UtilityEvaluation(["winogrande", "gsm8"]), stage="predict")


def test_a_missing_package_is_refused_with_the_way_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(TemperError, match=r"lm-eval .*pip install -e '\.\[lm-eval\]'"):
        _setup(UtilityEvaluation(["colours"]))


def test_missing_network_and_missing_chat_template_are_refused():
    with pytest.raises(TemperError, match="UtilityEvaluation: model=LightningModule .*network"):
        _setup(UtilityEvaluation(["colours"]), network=False)
    with pytest.raises(
        TemperError,
        match="apply_chat_template=true: .*chat template",
    ):
        _setup(UtilityEvaluation(["colours"], apply_chat_template=True))


def test_a_tokenizer_must_tell_the_choices_apart(in_root, monkeypatch):
    monkeypatch.setattr(Data, "tokenizer", build_tokenizer(language_spec("tiny")))
    with pytest.raises(
        TemperError,
        match=r"UtilityEvaluation\.tasks: .*20 of the first 20 rows of 'colours'",
    ):
        _setup(UtilityEvaluation(["colours"], "configs/lm_eval"))
    _setup(UtilityEvaluation(["letters"], "tests/callbacks/letters"))


@pytest.mark.parametrize(
    "arguments",
    [
        {"tasks": []},
        {"batch_size": 0},
        {"limit": 0},
        {"num_fewshot": -1},
        {"include_path": "no/such"},
    ],
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(TemperError, match=r"UtilityEvaluation"):
        UtilityEvaluation(**({"tasks": ["colours"]} | arguments))


@pytest.mark.slow
def test_benchmarks_of_the_shipped_config_exist_in_the_harness():
    import yaml

    pytest.importorskip("lm_eval")
    (callback,) = yaml.safe_load((ROOT / "configs/trainer/utility_zhan.yaml").read_text())[
        "trainer"
    ]["callbacks+"]
    tasks = callback["init_args"]["tasks"]
    assert len(tasks) == 5
    _setup(UtilityEvaluation(tasks))  # refuses a task that the harness does not have
