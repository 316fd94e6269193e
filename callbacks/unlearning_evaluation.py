"""How much of what was to be unlearned is still there, and how much of the rest."""

from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as L
import torch
from rich.console import Console
from rich.table import Table

from callbacks.evaluation import EvaluationCallback, refuse_without
from datamodules.synthetic import SyntheticDataModule
from datamodules.unlearning_rows import synthetic_unlearning_rows
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


class UnlearningEvaluation(EvaluationCallback):
    """TOFU's and MUSE's metrics: what is left of the forget set, and of the rest.

    At the end of every validation (and under ``validate`` and ``test``): answer probability, truth
    ratio, ROUGE-L recall of greedy answers, extraction strength and exact memorisation on each set;
    model utility (harmonic mean of the retain set's probability, ROUGE-L and truth ratio); min-k %
    membership AUROC, forget against holdout; and, with a ``retain_model``, forget quality (p-value
    of a Kolmogorov-Smirnov test between both models' truth ratios on the forget set) and privacy
    leakage. Definitions: `temper.metrics.memorisation` and `temper.metrics.unlearning`.

    Writes ``unlearning.json`` to the run folder, logs ``unlearning/*``, and prints a table under
    ``validate`` and ``test``. Means over rows have ``n`` and conservative 95 % intervals. A
    collapsed model has good forget metrics and no utility: read them together, and beside
    `SafetyEvaluation`.

    The rows come from ``datamodule.unlearning_rows() -> dict[str, Batch]``, asked once after the
    datamodule's `setup`, the same on every rank, with the sets ``forget``, ``holdout`` (never
    trained on, otherwise like ``forget``) and ``retain``. A set holds ``input_ids``,
    ``attention_mask``, ``labels`` (``B x K x T``, padded on the right, answers labelled with their
    end token) and ``ids``. Sequence 0 is the prompt with its true answer, the others are the same
    prompt with wrong (perturbed) answers; one that does not exist is a sequence without labels.
    ``B x 2 x T`` has one wrong answer; ``B x T`` none, and then the metrics that need one are left
    out. A datamodule on the synthetic language that does not define the method is read by
    `datamodules.unlearning_rows.synthetic_unlearning_rows`.

    Relearning is measured by the ordinary attack stage: fine-tune the export, say on
    ``SyntheticAttack``, then ``validate`` the attacked export with the unlearning data and this
    callback.

    Args:
        retain_model: Folder of a model trained without the forget set (an adapter is merged); null:
            no forget quality.
        batch_size: Rows per forward pass and device.
        min_k: Share of an answer's tokens, the least likely ones, that min-k % looks at.
    """

    def __init__(
        self, retain_model: str | None = None, batch_size: int = 64, min_k: float = 0.2
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise TemperError(f"UnlearningEvaluation.batch_size={batch_size}: give at least 1")
        if not 0 < min_k <= 1:
            raise TemperError(
                f"UnlearningEvaluation.min_k={min_k}: give a share in (0, 1], such as 0.2"
            )
        self.retain_model, self.batch_size, self.min_k = retain_model, batch_size, min_k
        self.rows: dict[str, Batch] = {}
        self._of_retain_model: tuple[UnlearningMetrics, MetricValues] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the rows, and refuse what would otherwise fail after training.

        Raises:
            TemperError: no rows to measure on, no such retain model, or a module that never holds
                its logits, or does not score or generate.
        """
        refuse_without(self, pl_module, "score", "generate")
        data = trainer.datamodule  # type: ignore[attr-defined]
        if getattr(pl_module, "fused_loss", False):
            raise TemperError(
                "model.init_args.fused_loss=true: UnlearningEvaluation reads logits, which it never"
                " holds; set it to false"
            )
        folder = self.retain_model
        if folder is not None and not any(
            (Path(folder) / name).is_file() for name in ("config.json", "adapter_config.json")
        ):
            raise TemperError(
                f"UnlearningEvaluation.retain_model={folder}: no model in it; give a run's export/"
                " folder, or null"
            )
        if hasattr(data, "unlearning_rows"):
            found = data.unlearning_rows()
        elif isinstance(data, SyntheticDataModule):
            found = synthetic_unlearning_rows(data)
        else:
            raise TemperError(
                f"data={type(data).__name__} has no unlearning_rows(): define it (see"
                " UnlearningEvaluation), or drop the callback"
            )
        if set(found) != set(SETS):
            raise TemperError(
                f"data={type(data).__name__}: unlearning_rows() gives {', '.join(found)}; it must"
                f" give {', '.join(SETS)}"
            )
        self.rows, self._of_retain_model = (
            {name: _answers_apart(rows) for name, rows in found.items()},
            None,
        )

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, finish over all ranks, log, write, print."""
        if trainer.sanity_checking:
            return
        self.evaluated = True
        pad_id = trainer.datamodule.tokenizer.pad_token_id  # type: ignore[attr-defined]
        measured = self._empty(trainer, pl_module)
        for name, batch in self._batches(trainer, pl_module):
            with trainer.precision_plugin.forward_context():
                scores = pl_module.score(batch, logits=True)  # type: ignore[operator]
                answers = pl_module.generate(_prompts(batch, pad_id))  # type: ignore[operator]
            measured.update(name, scores, batch["labels"], answers)
        metrics = measured.compute()
        if self.retain_model is not None:
            if self._of_retain_model is None:  # it never changes: read once
                self._of_retain_model = self._read_retain_model(trainer, pl_module)
            metrics |= against_retain_model(measured, metrics, *self._of_retain_model)
        pl_module.log_dict(
            {f"unlearning/{name}": torch.tensor(m["value"]) for name, m in metrics.items()},
            rank_zero_only=True,
        )
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
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        wrong = sets_with_wrong_answers(self.rows)
        return UnlearningMetrics(
            wrong, self.min_k, tokenizer.eos_token_id, tokenizer.all_special_ids, pl_module.device
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

    def _read_retain_model(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> tuple[UnlearningMetrics, MetricValues]:
        with torch.random.fork_rng(
            devices=[]
        ):  # loading an adapter draws random numbers, and training must not notice
            spec = NetworkSpec(path=self.retain_model, adapter="merge")
            network = build_network(spec, trainer.datamodule.tokenizer)  # type: ignore[attr-defined]
        network = network.to(pl_module.device).eval().requires_grad_(False)
        measured = self._empty(trainer, pl_module)
        for name, batch in self._batches(trainer, pl_module):
            with trainer.precision_plugin.forward_context():
                measured.update(name, score(network, batch), batch["labels"])
        return measured, measured.compute()


def _answers_apart(rows: Batch) -> Batch:
    """``B x T`` as ``B x 1 x T``."""
    return {
        name: value.unsqueeze(1) if name in PADDED and value.ndim == 2 else value
        for name, value in rows.items()
    }


def _prompts(batch: Batch, pad_id: int) -> Batch:
    """The prompts of rows, padded on the left: what comes before the first label of the true
    answer.
    """
    labelled = batch["labels"][:, 0] != IGNORE_INDEX
    present = batch["attention_mask"][:, 0].bool() & (labelled.cumsum(-1) == 0)
    rows = pad_left(batch["input_ids"][:, 0], present, pad_id)
    width = int(present.sum(-1).max())
    return {name: value[:, -width:] for name, value in rows.items()}


def _print(metrics: MetricValues) -> None:
    table = Table(title="Unlearning evaluation")
    table.add_column("Set")
    table.add_column("Metric")
    for column in ("Value", "95 %", "n"):
        table.add_column(column, justify="right")
    for name, m in metrics.items():
        rows, _, key = name.rpartition("/")
        interval = f"{m['ci_low']:.3f} to {m['ci_high']:.3f}" if "ci_low" in m else ""
        table.add_row(
            rows.replace("_", " "), title(key), f"{m['value']:.3g}", interval, str(m.get("n", ""))
        )
    Console().print(table)
