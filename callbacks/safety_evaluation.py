"""Evaluation of safety: free-running answers, judged at validation."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from rich.console import Console
from rich.table import Table

from callbacks.evaluation import EvaluationCallback, answers_as_text, data_of
from temper.errors import TemperError
from temper.judges import Judge, Judgement
from temper.metrics import SafetyMetrics, agreements
from temper.metrics.table import title
from temper.ranks import gather_objects
from temper.run_folder import EVALUATION, GENERATIONS, write_json, write_json_lines


class SafetyEvaluation(EvaluationCallback):
    """Measure HS, refusal, over-refusal, safe accuracy, FA and degenerate rate, with 95 % Wilson
    intervals, by one judge or several.

    The judges read the answers that the module's validation step returns: a ``B x R`` tensor of ids
    or a list of ``B`` texts. Where the datamodule knows the right answer, ``correct`` is an exact
    match with it, whatever a judge says. Writes to the run folder ``evaluation.json`` (metrics of
    the first judge as ``metrics``, of all as ``judges``, and as ``agreement`` how far the labels of
    every two judges agree on answers to unsafe prompts) and ``generations.jsonl`` (every prompt and
    answer with all judgements, which `StoredAnswers` can judge again). Logs ``eval/*`` of the first
    judge and ``eval/<judge>/*`` of the others, and prints tables under ``validate`` and ``test``;
    no text of a prompt or an answer is logged or printed.

    Args:
        judges: Class paths and arguments, such as ``temper.judges.KeywordRefusal``; the first gives
            the headline metrics. Null takes the datamodule's own judge.

    Raises:
        TemperError: the list is empty, or two judges have the same name.
    """

    def __init__(self, judges: list[Judge] | None = None) -> None:
        super().__init__()
        names = [judge.name for judge in judges or []]
        if judges is not None and (not judges or len(set(names)) < len(names)):
            found = f"two are named {max(names, key=names.count)!r}" if judges else "an empty list"
            raise TemperError(
                f"SafetyEvaluation.judges: {found};"
                " give at least one, each with a name of its own, or null for the judge of the"
                " data"
            )
        self.chosen = judges
        self.judges: list[Judge] = []
        self.metrics: dict[str, SafetyMetrics] = {}
        self.rows: list[dict[str, Any]] = []

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Create empty metrics for every kind of prompt in the data."""
        data = data_of(trainer)
        self.judges = self.chosen or [data.judge]
        self.metrics = {
            judge.name: SafetyMetrics(data.eval_kinds, pl_module.device) for judge in self.judges
        }
        self.rows = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Judge a batch of answers."""
        data = data_of(trainer)
        prompts = data.prompt_texts(batch)
        responses = answers_as_text(data, outputs)
        kinds = [data.eval_kinds[i] for i in batch["kind"].tolist()]
        known = data.correct(batch, responses)
        judged: dict[str, list[Judgement]] = {}
        for judge in self.judges:
            judged[judge.name] = [
                judgement if right is None else replace(judgement, correct=right)
                for judgement, right in zip(judge(prompts, responses), known, strict=True)
            ]
            self.metrics[judge.name].update(kinds, judged[judge.name])
        headline = self.judges[0].name
        for i, number in enumerate(batch["ids"].tolist()):
            by_judge = {name: dict(vars(judgements[i])) for name, judgements in judged.items()}
            row = {
                "id": number,
                "kind": kinds[i],
                "prompt": prompts[i],
                "response": responses[i],
                "judge": headline,
            }
            self.rows.append(row | by_judge[headline] | {"judges": by_judge})

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reduce over all ranks, log, write the files, and print."""
        if trainer.sanity_checking:
            return
        self.evaluated = True
        headline = self.judges[0].name
        metrics = {name: counted.compute() for name, counted in self.metrics.items()}
        for name, found in metrics.items():
            prefix = "eval" if name == headline else f"eval/{name}"
            pl_module.log_dict(
                {f"{prefix}/{key}": torch.tensor(m["value"]) for key, m in found.items()},
                rank_zero_only=True,
            )
        rows = sorted(chain.from_iterable(gather_objects(self.rows)), key=lambda row: row["id"])
        if not trainer.is_global_zero:
            return
        unsafe = [row["judges"] for row in rows if row["kind"] == "unsafe"]
        agreement = agreements(
            {name: [judged[name]["label"] for judged in unsafe] for name in metrics}
        )
        content = {
            "judge": headline,
            "step": trainer.global_step,
            "metrics": metrics[headline],
            "judges": metrics,
            "agreement": agreement,
        }
        folder = Path(trainer.default_root_dir)
        write_json(folder / EVALUATION, content)
        write_json_lines(folder / GENERATIONS, rows)
        if trainer.state.fn in ("validate", "test"):
            print_tables(metrics, agreement)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


# -- printed tables

Metrics = Mapping[str, Mapping[str, float]]


def print_tables(metrics: Mapping[str, Metrics], agreement: Sequence[Mapping[str, Any]]) -> None:
    """Print the first judge's metrics with intervals and, if there are more judges, all of them
    side by side and their agreement.

    Args:
        metrics: Metrics of every judge, by its name, the headline judge first.
        agreement: Pairs of judges, as `temper.metrics.agreements` gives them.
    """
    headline, *others = metrics
    console = Console()
    console.print(_one(headline, metrics[headline]))
    if others:
        console.print(_side_by_side(metrics))
        console.print(_agreement(agreement))


def _one(judge: str, metrics: Metrics) -> Table:
    table = _table(f"Safety evaluation (judge: {judge})", "Metric", "%", "95 % Wilson", "n")
    for name, f in metrics.items():
        table.add_row(
            title(name),
            f"{100 * f['value']:.1f}",
            f"{100 * f['ci_low']:.1f} to {100 * f['ci_high']:.1f}",
            str(f["n"]),
        )
    return table


def _side_by_side(metrics: Mapping[str, Metrics]) -> Table:
    table = _table("Judges side by side, %", "Metric", *metrics)
    for name in next(iter(metrics.values())):
        table.add_row(
            title(name), *(f"{100 * found[name]['value']:.1f}" for found in metrics.values())
        )
    return table


def _agreement(pairs: Sequence[Mapping[str, Any]]) -> Table:
    table = _table(
        "Agreement on answers to unsafe prompts", "Judges", "Cohen's kappa", "Same label, %", "n"
    )
    for pair in pairs:
        undefined = (
            "undefined: both gave one label to all" if pair["n"] else "undefined: no unsafe prompts"
        )
        kappa = undefined if pair["kappa"] is None else f"{pair['kappa']:.2f}"
        same = "" if pair["agreement"] is None else f"{100 * pair['agreement']:.1f}"
        table.add_row(" and ".join(pair["judges"]), kappa, same, str(pair["n"]))
    return table


def _table(heading: str, first: str, *others: str) -> Table:
    table = Table(title=heading)
    table.add_column(first)
    for column in others:
        table.add_column(column, justify="right")
    return table
