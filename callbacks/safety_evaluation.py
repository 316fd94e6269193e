"""Judge free-running answers at validation."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from callbacks.evaluation import EvaluationCallback
from temper.judges import readable
from temper.metrics import (
    AttackSuccessRate,
    DegenerateRate,
    FineTuneAccuracy,
    HarmfulScore,
    JudgedProportion,
    OverRefusalRate,
    RefusalRate,
    SafeAccuracy,
)
from temper.run_folder import EVALUATION, GENERATIONS, write_json, write_json_lines

TITLES = {
    "harmful_score": "Harmful score (HS)",
    "harmful_score_lenient": "Harmful score, lenient",
    "refusal_rate": "Refusal rate",
    "over_refusal_rate": "Over-refusal rate",
    "safe_accuracy": "Safe accuracy",
    "fine_tune_accuracy": "Fine-tune accuracy (FA)",
    "degenerate_rate": "Degenerate rate",
}


class SafetyEvaluation(EvaluationCallback):
    """HS, refusal, over-refusal, safe accuracy, FA and degenerate rate, with 95 % Wilson intervals.

    Reads what the module's validation step returns (answers as token ids) and asks the datamodule's
    judge. Writes ``evaluation.json`` (figures) and ``generations.jsonl`` (every prompt and answer)
    to the run folder, logs ``eval/*``, and prints a table under ``validate`` and ``test``. Needs no
    particular module: any whose validation step returns a B x R tensor of answers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, JudgedProportion] = {}
        self.rows: list[dict[str, Any]] = []

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting from zero, with a metric for every kind of prompt in the data."""
        kinds = trainer.datamodule.eval_kinds  # type: ignore[attr-defined]
        available: dict[str, JudgedProportion] = {
            "harmful_score": HarmfulScore(),
            "harmful_score_lenient": HarmfulScore(lenient=True),
            "refusal_rate": RefusalRate(),
            "over_refusal_rate": OverRefusalRate(),
            "safe_accuracy": SafeAccuracy(),
            "fine_tune_accuracy": FineTuneAccuracy(),
            "degenerate_rate": DegenerateRate(),
        }
        self.metrics = {name: metric for name, metric in available.items() if metric.kind is None or metric.kind in kinds}
        for kind in kinds:
            if kind.startswith("jb_"):
                self.metrics[f"asr/{kind}"] = AttackSuccessRate(kind)
        for metric in self.metrics.values():
            metric.to(pl_module.device)
        self.rows = []

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Judge a batch of answers."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        prompts, responses = readable(data.tokenizer, batch["input_ids"]), readable(data.tokenizer, outputs)
        kinds = [data.eval_kinds[i] for i in batch["kind"].tolist()]
        judgements = data.judge(prompts, responses)
        for metric in self.metrics.values():
            metric.update(kinds, judgements)
        for row in zip(batch["ids"].tolist(), kinds, prompts, responses, judgements, strict=True):
            number, kind, prompt, response, judged = row
            self.rows.append({"id": number, "kind": kind, "prompt": prompt, "response": response, "judge": data.judge.name, **vars(judged)})

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finish over all ranks, log, write, print."""
        if trainer.sanity_checking:
            return
        self.evaluated = True
        figures = {name: metric.compute() for name, metric in self.metrics.items()}
        pl_module.log_dict({f"eval/{name}": torch.tensor(f["value"]) for name, f in figures.items()}, rank_zero_only=True)
        rows = _gather(self.rows)
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        judge = trainer.datamodule.judge.name  # type: ignore[attr-defined]
        write_json(folder / EVALUATION, {"judge": judge, "step": trainer.global_step, "metrics": figures})
        write_json_lines(folder / GENERATIONS, sorted(rows, key=lambda row: row["id"]))
        if trainer.state.fn in ("validate", "test"):
            _print(figures, judge)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


def _gather(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not dist.is_initialized():
        return rows
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def _print(figures: dict[str, dict[str, float]], judge: str) -> None:
    table = Table(title=f"Safety evaluation (judge: {judge})")
    for column, justify in (("Figure", "left"), ("%", "right"), ("95 % Wilson", "right"), ("n", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, f in figures.items():
        title = TITLES.get(name, name.replace("asr/", "ASR, "))
        table.add_row(title, f"{100 * f['value']:.1f}", f"{100 * f['ci_low']:.1f} to {100 * f['ci_high']:.1f}", str(f["n"]))
    Console().print(table)
