"""Unlearning metrics of a run: against a plain loop, and over batches, ranks and the CLI."""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch

from callbacks.unlearning_evaluation import UnlearningEvaluation, _prompts
from datamodules.synthetic_unlearning import SyntheticUnlearning
from datamodules.unlearning_rows import synthetic_unlearning_rows
from lightning_modules import SFTModule
from temper.data import Batch
from temper.data.pool import RowsPool
from temper.errors import TemperError
from temper.models import LoRASpec, NetworkSpec, build_network, export_network
from temper.synthetic.tokenizer import EOS, SPECIAL
from tests.callbacks.runs import evaluate
from tests.integration.strategy_runs import ROOT, worker_environment
from tests.objectives import fit, make_module, same_bits, trained_weights

ROWS = (
    "answer_probability",
    "truth_ratio",
    "rouge_l_recall",
    "extraction_strength",
    "exact_memorisation",
)
NAMES = {f"{name}/{metric}" for name in ("forget", "holdout", "retain") for metric in ROWS} | {
    "membership_auroc",
    "model_utility",
}
CALLBACK = "callbacks.unlearning_evaluation.UnlearningEvaluation"


def _data(**arguments) -> SyntheticUnlearning:
    return SyntheticUnlearning(
        **{
            "preset": "tiny",
            "n_forget": 16,
            "n_retain": 16,
            "batch_size": 8,
            "retain_batch_size": 8,
            "n_eval": 9,
            "seed": 1,
        }
        | arguments
    )


def _module(**settings) -> SFTModule:
    return make_module(SFTModule, _data(), **settings)


def _validate(folder: Path, module=None, data=None, verb: str = "validate", **arguments) -> dict:
    callback = UnlearningEvaluation(**arguments)
    evaluate(folder, [callback], module or _module(), data or _data(), verb)
    return json.loads((folder / "unlearning.json").read_text())


@torch.no_grad()
def _by_hand(network: torch.nn.Module, rows: Batch) -> dict[str, list[float]]:
    """Metrics of each row: one sequence at a time, without padding; the answer also written token
    by token.
    """
    found: dict[str, list[float]] = {
        name: [] for name in ("probability", "log_ratio", "rouge", "es", "em", "min_k")
    }
    for ids_KT, mask_KT, labels_KT in zip(
        rows["input_ids"], rows["attention_mask"], rows["labels"], strict=True
    ):
        means = []
        for k, (ids, mask, labels) in enumerate(zip(ids_KT, mask_KT, labels_KT, strict=True)):
            size = int(mask.sum())
            logits = network(input_ids=ids[None, :size]).logits[0]
            places = [t for t in range(1, size) if labels[t] != -100]
            logps = [float(logits[t - 1].log_softmax(-1)[ids[t]]) for t in places]
            means.append(sum(logps) / len(logps))
            if k:
                continue
            right = [int(logits[t - 1].argmax()) == int(ids[t]) for t in places][:-1]
            lowest = sorted(logps[:-1])[: max(1, int(0.4 * len(right)))]
            found["em"].append(sum(right) / len(right))
            found["es"].append(
                1 - next(i for i in range(len(right) + 1) if all(right[i:])) / len(right)
            )
            found["min_k"].append(sum(lowest) / len(lowest))
            written = ids[: places[0]].tolist()
            while (
                len(written) < places[0] + 7 and written[-1] != EOS
            ):  # the longest answer: 5 letters, STOP, EOS
                written.append(
                    int(network(input_ids=torch.tensor([written])).logits[0, -1].argmax())
                )
            truth = [int(ids[t]) for t in places if ids[t] >= len(SPECIAL)]
            answer = [token for token in written[places[0] :] if token >= len(SPECIAL)]
            table = [[0] * (len(answer) + 1) for _ in range(len(truth) + 1)]
            for i, a in enumerate(truth):
                for j, b in enumerate(answer):
                    table[i + 1][j + 1] = (
                        table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
                    )
            found["rouge"].append(table[-1][-1] / len(truth))
        found["probability"].append(math.exp(means[0]))
        found["log_ratio"].append(sum(means[1:]) / len(means[1:]) - means[0])
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_every_metric_is_that_of_a_plain_loop(tmp_path):
    module = _module().eval()
    found = _validate(tmp_path, module)
    metrics = found["metrics"]
    assert set(metrics) == NAMES and (found["min_k"], found["retain_model"]) == (0.4, None)
    data = _data()
    data.setup("validate")
    hand = {
        name: _by_hand(module.network, rows)
        for name, rows in synthetic_unlearning_rows(data).items()
    }
    for name, by_row in hand.items():
        ratios = [math.exp(r) for r in by_row["log_ratio"]]
        expected = {
            "answer_probability": _mean(by_row["probability"]),
            "truth_ratio": _mean(
                [max(0.0, 1 - r) if name == "retain" else min(r, 1 / r) for r in ratios]
            ),
            "rouge_l_recall": _mean(by_row["rouge"]),
            "extraction_strength": _mean(by_row["es"]),
            "exact_memorisation": _mean(by_row["em"]),
        }
        for metric, value in expected.items():
            assert metrics[f"{name}/{metric}"]["value"] == pytest.approx(
                value, rel=1e-6, abs=1e-9
            ), (name, metric)
            assert metrics[f"{name}/{metric}"]["n"] == 9
    pairs = [
        (a > b) + 0.5 * (a == b) for a in hand["forget"]["min_k"] for b in hand["holdout"]["min_k"]
    ]
    assert metrics["membership_auroc"]["value"] == pytest.approx(_mean(pairs), abs=1e-6)
    utility = [
        metrics[f"retain/{part}"]["value"]
        for part in ("answer_probability", "rouge_l_recall", "truth_ratio")
    ]
    assert metrics["model_utility"]["value"] == (
        pytest.approx(3 / sum(1 / v for v in utility)) if min(utility) else 0.0
    )
    assert 0 < metrics["forget/exact_memorisation"]["value"] < 1, (
        "a test on a model without any hit would prove nothing"
    )


def test_the_size_of_a_batch_changes_nothing(tmp_path):
    one, four = (_validate(tmp_path / str(size), batch_size=size)["metrics"] for size in (1, 4))
    for name, metric in one.items():
        assert metric == {
            key: pytest.approx(value, rel=1e-9) if key != "of" else value
            for key, value in four[name].items()
        }, name


def test_ranks_share_the_rows_and_count_none_twice(tmp_path, monkeypatch):
    shares = []
    for rank in (0, 1):
        callback = UnlearningEvaluation(batch_size=2)
        data = _data()
        data.setup("validate")
        callback.rows = synthetic_unlearning_rows(data)
        trainer = type("Trainer", (), {"global_rank": rank, "world_size": 2})
        module = type("Module", (), {"device": torch.device("cpu")})
        shares.append(
            [
                (name, i)
                for name, batch in callback._batches(trainer, module)
                for i in batch["ids"].tolist()
            ]
        )
    assert sorted(shares[0] + shares[1]) == sorted(
        (name, i) for name in ("forget", "holdout", "retain") for i in range(9)
    )


def test_prompts_end_before_the_answer_and_are_left_padded():
    data = _data()
    data.setup("validate")
    for rows in synthetic_unlearning_rows(data).values():
        prompts = _prompts(rows, 0)
        columns = (
            rows["input_ids"][:, 0],
            rows["labels"][:, 0],
            prompts["input_ids"],
            prompts["attention_mask"],
        )
        for ids, labels, prompt, present in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            size = next(t for t, label in enumerate(labels) if label != -100)
            assert prompt == [0] * (len(prompt) - size) + ids[:size]
            assert present == [0] * (len(prompt) - size) + [1] * size
        assert prompts["attention_mask"][:, 0].any(), "no column is padding alone"


def test_memorised_forget_rows_show_in_the_metrics(
    tmp_path,
):
    data = _data(n_eval=16)
    module = make_module(
        SFTModule, data, double=False, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2)
    )
    export_network(module.network, data.tokenizer, tmp_path / "retain", merge=True)
    data.setup("fit")
    rows = {
        name: value[:, 0] if value.ndim == 3 else value
        for name, value in data.sources["forget"].rows.items()
    }
    data.setup = lambda stage: None
    data.sources["forget"].pool = RowsPool(rows)  # answers alone, the primary stream
    fit(module, data, 250)
    found = _validate(tmp_path, module, data, retain_model=str(tmp_path / "retain"))["metrics"]
    for metric in ("extraction_strength", "exact_memorisation", "rouge_l_recall"):
        assert (
            found[f"forget/{metric}"]["value"] > 0.95 > found[f"holdout/{metric}"]["value"] + 0.2
        ), metric
    assert (
        found["forget/answer_probability"]["value"] > 0.9
        and found["forget/truth_ratio"]["value"] < 0.3
    )
    assert found["membership_auroc"]["value"] > 0.9
    assert found["forget_quality"]["value"] < 1e-5 and (
        found["forget_quality"]["n"],
        found["forget_quality"]["n_retain"],
    ) == (16, 16)
    assert found["privacy_leakage"]["value"] < -50


def test_a_model_has_the_forget_quality_of_1_beside_itself(tmp_path):
    module = _module(double=False)
    export_network(module.network, _data().tokenizer, tmp_path / "retain", merge=True)
    found = _validate(tmp_path, module, retain_model=str(tmp_path / "retain"))["metrics"]
    assert (found["forget_quality"]["value"], found["forget_quality"]["statistic"]) == (1.0, 0.0)
    assert found["privacy_leakage"]["value"] == 0.0
    assert found["retain_model/membership_auroc"] == found["membership_auroc"]


class _NoRows(SyntheticUnlearning):
    unlearning_rows = None


class _OwnRows(SyntheticUnlearning):
    """Rows as somebody else's datamodule might give them: of one or of two answers."""

    n_answers = 1

    def unlearning_rows(self) -> dict[str, Batch]:
        found = synthetic_unlearning_rows(self)
        cut = slice(0, 2) if self.n_answers == 2 else 0
        return {
            name: {k: v[:, cut] if v.ndim == 3 else v for k, v in rows.items()}
            for name, rows in found.items()
        }


@pytest.mark.parametrize("n_answers", [1, 2])
def test_rows_may_hold_one_answer_or_two(tmp_path, n_answers):
    data = _OwnRows(
        preset="tiny", n_forget=16, n_retain=16, batch_size=8, retain_batch_size=8, n_eval=9, seed=1
    )
    data.n_answers = n_answers
    metrics = _validate(tmp_path, data=data)["metrics"]
    missing = (
        {f"{name}/truth_ratio" for name in ("forget", "holdout", "retain")}
        if n_answers == 1
        else set()
    )
    assert set(metrics) == NAMES - missing
    whole = _validate(tmp_path / "whole")["metrics"]
    assert metrics["forget/answer_probability"] == pytest.approx(whole["forget/answer_probability"])
    assert ("truth_ratio" in metrics["model_utility"]["of"]) == (n_answers == 2)


def test_paraphrases_are_the_right_answers_of_the_truth_ratio(tmp_path):
    """In half of the rows the second answer is a paraphrase: it is compared in the true one's
    place.
    """
    module = _module().eval()
    data = _data()
    data.setup("validate")
    given = synthetic_unlearning_rows(data)
    n = len(given["forget"]["ids"])
    flags = torch.arange(n) % 2 == 0
    expected = {}
    for name, rows in given.items():
        ratios = []
        for i in range(n):
            means = [_mean_logp(module.network, rows, i, k) for k in range(6)]
            right = int(flags[i])
            ratios.append(math.exp(_mean(means[right + 1 :]) - means[right]))
        expected[name] = _mean(
            [max(0.0, 1 - r) if name == "retain" else min(r, 1 / r) for r in ratios]
        )
    data.unlearning_rows = lambda: {
        name: rows | {"paraphrased": flags} for name, rows in given.items()
    }
    found = _validate(tmp_path, module, data, batch_size=4)["metrics"]
    plain = _validate(tmp_path / "plain", module)["metrics"]
    for name, value in expected.items():
        assert found[f"{name}/truth_ratio"]["value"] == pytest.approx(value, rel=1e-6)
        assert found[f"{name}/answer_probability"] == pytest.approx(
            plain[f"{name}/answer_probability"], rel=1e-9
        )
    assert found["forget/truth_ratio"]["value"] != pytest.approx(
        plain["forget/truth_ratio"]["value"], rel=1e-3
    )


@torch.no_grad()
def _mean_logp(network: torch.nn.Module, rows: Batch, i: int, k: int) -> float:
    """Mean log-probability of the labelled tokens of one sequence, without padding."""
    size = int(rows["attention_mask"][i, k].sum())
    ids = rows["input_ids"][i, k, :size]
    logits = network(input_ids=ids[None]).logits[0].log_softmax(-1)
    return _mean(
        [float(logits[t - 1, ids[t]]) for t in range(1, size) if rows["labels"][i, k, t] != -100]
    )


# -- from the command line


def _own(folder: Path, **arguments) -> Path:
    text = ", ".join(f"{name}: {value}" for name, value in arguments.items())
    (folder / "own.yaml").write_text(
        f"trainer: {{callbacks+: [{{class_path: {CALLBACK}, init_args: {{{text}}}}}]}}\n"
    )
    return folder / "own.yaml"


def test_the_command_line_logs_writes_and_prints_metrics(temper, tmp_path, tiny_run, capsys):
    trainer = ["configs/trainer/cpu.yaml", _own(tmp_path, retain_model=tiny_run / "export")]
    temper("fit", tmp_path / "fit", data="alignment", trainer=trainer)
    found = json.loads((tmp_path / "fit" / "unlearning.json").read_text())
    assert found["step"] == 2 and set(found["metrics"]) == NAMES | {
        "forget_quality",
        "privacy_leakage",
        "retain_model/membership_auroc",
    }
    header, *lines = (
        line.split(",") for line in (tmp_path / "fit" / "metrics.csv").read_text().splitlines()
    )
    column = header.index("unlearning/forget/answer_probability")
    logged = [float(line[column]) for line in lines if line[column]]
    assert logged == pytest.approx([found["metrics"]["forget/answer_probability"]["value"]])
    capsys.readouterr()
    temper(
        "validate",
        tmp_path / "again",
        data="alignment",
        trainer=trainer,
        model=tmp_path / "fit" / "export",
    )
    printed = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.count("│") == 6
    ]
    again = json.loads((tmp_path / "again" / "unlearning.json").read_text())["metrics"]
    assert again["forget/answer_probability"] == pytest.approx(
        found["metrics"]["forget/answer_probability"]
    )
    f = again["forget/extraction_strength"]
    assert [
        "forget",
        "Extraction strength (ES)",
        f"{f['value']:.3g}",
        f"{f['ci_low']:.3f} to {f['ci_high']:.3f}",
        "4",
    ] in printed
    assert [
        "",
        "Forget quality (KS p-value)",
        f"{again['forget_quality']['value']:.3g}",
        "",
        "4",
    ] in printed


@pytest.mark.distributed
def test_two_processes_find_the_metrics_of_one(tmp_path, tiny_run, tiny_command):
    trainer = [
        "configs/trainer/cpu.yaml",
        _own(tmp_path, retain_model=tiny_run / "export", batch_size=2),
    ]
    found = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        words = (
            f"--trainer.devices={devices}",
            "--data.init_args.n_eval=5",
            "--model.init_args.network.shape.seed=4",
        )
        strategy = ["--trainer.strategy=ddp"] if devices > 1 else []
        command = tiny_command(
            "validate", folder, *words, *strategy, data="alignment", trainer=trainer
        )
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=worker_environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads((folder / "unlearning.json").read_text())["metrics"])
    for name, metric in found[0].items():
        # Rows share batches of other widths: a truth ratio near 1 is off by a few 1e-7, and its
        # distance from 1 is the metric.
        other = found[1][name]
        assert metric == {
            key: pytest.approx(value, rel=1e-5, abs=1e-6) if key != "of" else value
            for key, value in other.items()
        }, name
    assert (found[1]["forget/answer_probability"]["n"], found[1]["forget_quality"]["n_retain"]) == (
        5,
        5,
    )
    assert found[1]["forget_quality"]["statistic"] > 0


def test_evaluation_does_not_change_training(tmp_path):
    found = []
    for callbacks in ([], [UnlearningEvaluation()]):
        torch.manual_seed(5)  # LoRA's initial weights come from the global stream
        module = make_module(SFTModule, _data(), double=False, lora=True)
        fit(
            module,
            _data(),
            4,
            limit_val_batches=1.0,
            val_check_interval=2,
            check_val_every_n_epoch=None,
            callbacks=callbacks,
            default_root_dir=tmp_path,
        )
        found.append(trained_weights(module))
    assert (tmp_path / "unlearning.json").exists()
    assert same_bits(*found)


def test_an_adapter_as_retain_model_is_merged_without_rng_draws(tmp_path):
    tokenizer = _data().tokenizer
    export_network(_module(double=False).network, tokenizer, tmp_path / "base", merge=True)
    adapted = build_network(
        NetworkSpec(path=str(tmp_path / "base"), lora=LoRASpec(rank=2)), tokenizer
    )
    export_network(adapted, tokenizer, tmp_path / "adapter", merge=False)
    module = _module(double=False)
    states = []
    for retain_model in (None, str(tmp_path / "adapter")):
        torch.manual_seed(3)
        found = _validate(tmp_path, module, retain_model=retain_model)["metrics"]
        states.append(torch.get_rng_state())
    assert found["forget_quality"]["value"] == 1.0  # a new adapter changes nothing
    assert torch.equal(*states)


def test_a_fit_without_evaluation_warns_and_leaves_no_file(tmp_path):
    with pytest.warns(UserWarning, match="UnlearningEvaluation: nothing was evaluated"):
        fit(
            _module(),
            _data(),
            1,
            limit_val_batches=1.0,
            num_sanity_val_steps=1,
            val_check_interval=100,
            check_val_every_n_epoch=None,
            callbacks=[UnlearningEvaluation()],
            default_root_dir=tmp_path,
        )
    assert not (tmp_path / "unlearning.json").exists()


def test_the_verb_test_gives_the_same_metrics(tmp_path):
    assert _validate(tmp_path / "a", verb="test")["metrics"] == _validate(tmp_path / "b")["metrics"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, r"UnlearningEvaluation\.batch_size=0: "),
        ({"min_k": 0.0}, r"UnlearningEvaluation\.min_k=0\.0: "),
        ({"min_k": 1.1}, r"UnlearningEvaluation\.min_k=1\.1: "),
        (
            {"retain_model": "/nowhere"},
            r"UnlearningEvaluation\.retain_model=/nowhere: .*export/",
        ),
    ],
)
def test_invalid_arguments_are_refused_before_training(tmp_path, arguments, message):
    with pytest.raises(TemperError, match=message):
        _validate(tmp_path, **arguments)


def test_missing_logits_and_missing_rows_are_refused(tmp_path):
    with pytest.raises(
        TemperError, match=r"model\.init_args\.fused_loss=true: UnlearningEvaluation .*logits"
    ):
        _validate(tmp_path, _module(fused_loss=True))
    data = _OwnRows(
        preset="tiny", n_forget=16, n_retain=16, batch_size=8, retain_batch_size=8, n_eval=9
    )
    data.unlearning_rows = lambda: {"forget": {}}
    with pytest.raises(
        TemperError, match=r"unlearning_rows\(\) gives forget; .*forget, holdout, retain"
    ):
        _validate(tmp_path, data=data)
    with pytest.raises(
        TemperError, match=r"UnlearningEvaluation: data=_NoRows .*unlearning_rows\(\)"
    ):
        sizes = {"n_forget": 16, "n_retain": 16, "batch_size": 8, "retain_batch_size": 8}
        _validate(tmp_path, data=_NoRows(preset="tiny", **sizes))
