"""Evaluation of unlearning: what the model still knows of the forget set, and of the rest.

Shapes: `B` rows, `K` answers to a prompt, `T` tokens of a sequence.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import lightning.pytorch as L
import torch
from rich.console import Console, JustifyMethod
from rich.table import Table

from callbacks.evaluation import EvaluationCallback, data_of, refuse_without
from temper.data import Batch, EvalSet, pad_left, trim
from temper.data.rows import PADDED
from temper.errors import TemperError
from temper.losses import IGNORE_INDEX
from temper.metrics.table import title
from temper.metrics.unlearning import (
    SETS,
    MetricValues,
    UnlearningMetrics,
    against_retain_model,
    sets_with_wrong_answers,
)
from temper.models import NetworkSpec, build_network, score
from temper.run_folder import write_json

UNLEARNING = "unlearning.json"


@runtime_checkable
class UnlearningRows(Protocol):
    """A datamodule that has rows to measure unlearning on."""

    def unlearning_rows(self) -> dict[str, Batch]:
        """The sets ``forget``, ``holdout`` (never trained on, otherwise like ``forget``) and
        ``retain``, the same on every rank. The callback calls this once, after the datamodule's
        ``setup``.

        Returns:
            For every set ``input_ids``, ``attention_mask``, ``labels`` (``B x K x T``, padded on
            the right, answers labelled with their end token) and ``ids`` (``B``). Sequence 0 is
            the prompt with its true answer, the others are the same prompt with wrong (perturbed)
            answers; a wrong answer that does not exist is a sequence without labels. ``B x T`` is
            a true answer alone, and then the metrics that need a wrong one are left out. A flag
            ``paraphrased`` (``B``, bool) says in which rows sequence 1 is no wrong answer but the
            true one in other words, which the truth ratio then takes as the right one, as TOFU's.
        """
        ...


class UnlearningEvaluation(EvaluationCallback):
    """Measure the metrics of TOFU and MUSE on the forget set, a holdout set and the retain set.

    At the end of every validation (and under ``validate`` and ``test``): answer probability, truth
    ratio, ROUGE-L recall of greedy answers, extraction strength and exact memorisation on each set;
    model utility (harmonic mean of the retain set's probability, ROUGE-L and truth ratio); min-k %
    membership AUROC, forget against holdout; and, with a ``retain_model``, forget quality (p-value
    of a Kolmogorov-Smirnov test between both models' truth ratios on the forget set) and privacy
    leakage. Definitions: `temper.metrics.memorisation` and `temper.metrics.unlearning`.

    Writes ``unlearning.json`` to the run folder, logs ``unlearning/*``, and prints a table under
    ``validate`` and ``test``. Means over rows have ``n`` and conservative 95 % intervals. A
    collapsed model has good forget metrics and no utility: read them together, and with those of
    `SafetyEvaluation`.

    The rows come from the datamodule (`UnlearningRows`).

    Relearning is measured by the attack stage: fine-tune the export, for example on
    ``SyntheticAttack``, then ``validate`` the attacked export with the unlearning data and this
    callback.

    Args:
        retain_model: Folder of a model trained without the forget set (an adapter is merged); null:
            no forget quality and no privacy leakage.
        batch_size: Rows per forward pass and device.
        min_k: Share of an answer's tokens, the least likely ones, that min-k % averages over; 0.4
            is that of open-unlearning's configs.
    """

    def __init__(
        self, retain_model: str | None = None, batch_size: int = 64, min_k: float = 0.4
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise TemperError(f"UnlearningEvaluation.batch_size={batch_size}: give at least 1")
        if not 0 < min_k <= 1:
            raise TemperError(
                f"UnlearningEvaluation.min_k={min_k}: give a share in (0, 1], such as 0.4"
            )
        self.retain_model = retain_model
        self.batch_size = batch_size
        self.min_k = min_k
        self.rows: dict[str, Batch] = {}
        self._of_retain_model: tuple[UnlearningMetrics, MetricValues] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Read the rows, and refuse settings that would otherwise fail after training.

        Raises:
            TemperError: there are no rows to measure on or no such retain model, or the module
                computes no logits (``fused_loss``), or does not score or generate.
        """
        refuse_without(self, pl_module, "score", "generate")
        if getattr(pl_module, "fused_loss", False):
            raise TemperError(
                "model.init_args.fused_loss=true: UnlearningEvaluation reads logits, which a fused"
                " loss does not keep; set it to false"
            )
        folder = self.retain_model
        if folder is not None and not any(
            (Path(folder) / name).is_file() for name in ("config.json", "adapter_config.json")
        ):
            raise TemperError(
                f"UnlearningEvaluation.retain_model={folder}: no model in it; give a run's export/"
                " folder, or null"
            )
        self.rows = _read_rows(trainer)
        self._of_retain_model = None

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, reduce over all ranks, log, write the file, and print."""
        if trainer.sanity_checking:
            return
        self.evaluated = True
        pad_id = int(data_of(trainer).tokenizer.pad_token_id)
        measured = self._empty(trainer, pl_module)
        for name, batch in self._batches(trainer, pl_module):
            with trainer.precision_plugin.forward_context():
                scores = pl_module.score(batch, logits=True)  # type: ignore[operator]
                answers = pl_module.generate(_prompts(batch, pad_id))  # type: ignore[operator]
            measured.update(name, scores, batch["labels"], answers, batch.get("paraphrased"))
        metrics = measured.compute()
        if self.retain_model is not None:
            if self._of_retain_model is None:  # it does not change: measured once
                self._of_retain_model = self._measure_retain_model(trainer, pl_module)
            metrics |= against_retain_model(measured, metrics, *self._of_retain_model)
        values = {
            f"unlearning/{name}": torch.tensor(metric["value"]) for name, metric in metrics.items()
        }
        pl_module.log_dict(values, rank_zero_only=True)
        if not trainer.is_global_zero:
            return
        settings = {
            "step": trainer.global_step,
            "min_k": self.min_k,
            "retain_model": self.retain_model,
        }
        write_json(Path(trainer.default_root_dir) / UNLEARNING, settings | {"metrics": metrics})
        if trainer.state.fn in ("validate", "test"):
            _print(metrics)

    on_test_epoch_end = on_validation_epoch_end

    def _empty(self, trainer: L.Trainer, pl_module: L.LightningModule) -> UnlearningMetrics:
        data = data_of(trainer)
        tokenizer = data.tokenizer
        wrong = sets_with_wrong_answers(self.rows)
        # The token that ends a turn need not be flagged special.
        special = [*tokenizer.all_special_ids, *data.end_tokens()]
        return UnlearningMetrics(
            wrong, self.min_k, tokenizer.eos_token_id, special, pl_module.device
        )

    def _batches(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> Iterator[tuple[str, Batch]]:
        """This rank's share of every set, each row once over all ranks."""
        for name in SETS:
            for batch in EvalSet(
                self.rows[name], self.batch_size, trainer.global_rank, trainer.world_size
            ):
                yield name, {key: value.to(pl_module.device) for key, value in trim(batch).items()}

    def _measure_retain_model(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> tuple[UnlearningMetrics, MetricValues]:
        # Loading an adapter draws random numbers, which must not change those of training.
        with torch.random.fork_rng(devices=[]):
            spec = NetworkSpec(path=self.retain_model, adapter="merge")
            network = build_network(spec, data_of(trainer).tokenizer)
        network = network.to(pl_module.device).eval().requires_grad_(False)
        measured = self._empty(trainer, pl_module)
        for name, batch in self._batches(trainer, pl_module):
            with trainer.precision_plugin.forward_context():
                measured.update(
                    name,
                    score(network, batch),
                    batch["labels"],
                    paraphrased_B=batch.get("paraphrased"),
                )
        return measured, measured.compute()


def _read_rows(trainer: L.Trainer) -> dict[str, Batch]:
    """The datamodule's sets, as ``B x K x T``."""
    data = data_of(trainer)
    name = type(data).__name__
    if not isinstance(data, UnlearningRows):
        raise TemperError(
            f"UnlearningEvaluation: data={name} has no unlearning_rows(); add the method (see"
            " callbacks/unlearning_evaluation.py), or drop the callback"
        )
    found = data.unlearning_rows()
    if set(found) != set(SETS):
        raise TemperError(
            f"data={name}: unlearning_rows() gives {', '.join(found)}; it must give"
            f" {', '.join(SETS)}"
        )
    return {set_name: _with_answer_dimension(rows) for set_name, rows in found.items()}


def _with_answer_dimension(rows: Batch) -> Batch:
    """Rows ``B x T`` as ``B x 1 x T``."""
    return {
        name: value.unsqueeze(1) if name in PADDED and value.ndim == 2 else value
        for name, value in rows.items()
    }


def _prompts(batch: Batch, pad_id: int) -> Batch:
    """The prompts of rows, padded on the left: the tokens before the first label of the true
    answer.
    """
    labelled = batch["labels"][:, 0] != IGNORE_INDEX
    present = batch["attention_mask"][:, 0].bool() & (labelled.cumsum(-1) == 0)
    rows = pad_left(batch["input_ids"][:, 0], present, pad_id)
    width = int(present.sum(-1).max())
    return {name: value[:, -width:] for name, value in rows.items()}


def _print(metrics: MetricValues) -> None:
    table = Table(title="Unlearning evaluation")
    columns: dict[str, JustifyMethod] = {
        "Set": "left",
        "Metric": "left",
        "Value": "right",
        "95 %": "right",
        "n": "right",
    }
    for column, justify in columns.items():
        table.add_column(column, justify=justify)
    for name, metric in metrics.items():
        set_name, _, key = name.rpartition("/")
        interval = (
            f"{metric['ci_low']:.3f} to {metric['ci_high']:.3f}" if "ci_low" in metric else ""
        )
        table.add_row(
            set_name.replace("_", " "),
            title(key),
            f"{metric['value']:.3g}",
            interval,
            str(metric.get("n", "")),
        )
    Console().print(table)
