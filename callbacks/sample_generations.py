"""Sample answers as text in the loggers."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.evaluation import EvaluationCallback, answers_as_text, data_of
from temper.errors import TemperError

KEY = "generations"
COLUMNS = ["kind", "prompt", "answer"]
HARMLESS = ("safe", "task")  # kinds of prompts whose answers cannot be harmful

Rows = list[list[str]]


def _to_tensorboard(logger: Any, rows: Rows, step: int) -> None:
    logger.experiment.add_text(KEY, _markdown(rows), step)


def _to_wandb(logger: Any, rows: Rows, step: int) -> None:
    logger.log_text(KEY, columns=COLUMNS, data=rows, step=step)


def _to_mlflow(logger: Any, rows: Rows, step: int) -> None:
    logger.experiment.log_text(logger.run_id, _markdown(rows), f"{KEY}/step_{step:06d}.md")


# Loggers that take text, and how each writes it; add further loggers here.
WRITERS: tuple[tuple[type[Logger], Callable[[Any, Rows, int], None]], ...] = (
    (TensorBoardLogger, _to_tensorboard),
    (WandbLogger, _to_wandb),
    (MLFlowLogger, _to_mlflow),
)


def _writers(trainer: L.Trainer) -> list[tuple[Logger, Callable[[Any, Rows, int], None]]]:
    """The run's loggers that take text, with what writes to each."""
    return [
        (logger, write)
        for logger in trainer.loggers
        for kind, write in WRITERS
        if isinstance(logger, kind)
    ]


class SampleGenerations(EvaluationCallback):
    """Log a few evaluation prompts with the model's answers, after every validation, to every
    logger that takes text: TensorBoard (tab Text), W&B (a table) and MLflow (an artifact).

    The prompts are always the same, so that one can follow an answer through training. Answers to
    prompts other than safe and task ones may be harmful, and a logger may send them to a server:
    they are left out unless ``show_unsafe`` is set. ``generations.jsonl`` in the run folder has all
    answers.

    Args:
        n: Number of prompts of each kind, taken from the beginning.
        show_unsafe: Whether prompts of the other kinds (unsafe, jailbreaks) and their answers are
            logged too.
    """

    def __init__(self, n: int = 4, show_unsafe: bool = False) -> None:
        super().__init__()
        if n < 1:
            raise TemperError(f"SampleGenerations.n={n}: give at least 1")
        self.n = n
        self.show_unsafe = show_unsafe
        self.rows: list[tuple[int, list[str]]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse, before training, prompts of which none may be shown; warn if nothing takes text.

        Raises:
            TemperError: no kind of prompt may be shown.
        """
        if stage == "predict":
            return
        kinds = data_of(trainer).eval_kinds
        if kinds and not self._shown(kinds):
            raise TemperError(
                "SampleGenerations.show_unsafe=false, and all evaluation prompts are"
                f" {', '.join(kinds)}: add safe or task prompts, set show_unsafe to true, or drop"
                " the callback"
            )
        if not _writers(trainer):
            rank_zero_warn(
                "SampleGenerations: no logger takes text; use TensorBoard (the default, if"
                " installed), W&B or MLflow"
            )

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drop the answers of the last validation."""
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
        """Keep the rows that are shown, on the first rank and from its share of the prompts."""
        data = data_of(trainer)
        kinds = [data.eval_kinds[i] for i in batch["kind"].tolist()]
        shown = set(self._shown(data.eval_kinds))
        if not trainer.is_global_zero or shown.isdisjoint(kinds):
            return
        texts = zip(
            batch["ids"].tolist(),
            kinds,
            data.prompt_texts(batch),
            answers_as_text(data, outputs),
            strict=True,
        )
        self.rows += [
            (number, [kind, prompt, answer])
            for number, kind, prompt, answer in texts
            if kind in shown
        ]
        self.rows = [
            row
            for kind in shown
            for row in sorted(row for row in self.rows if row[1][0] == kind)[: self.n]
        ]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the rows to the loggers."""
        if trainer.sanity_checking or not trainer.is_global_zero or not self.rows:
            return
        self.evaluated = True
        rows = [texts for _, texts in sorted(self.rows)]
        for text_logger, write in _writers(trainer):
            write(text_logger, rows, trainer.global_step)

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_end = on_validation_end

    def _shown(self, kinds: list[str]) -> list[str]:
        return [kind for kind in kinds if self.show_unsafe or kind in HARMLESS]


def _markdown(rows: Rows) -> str:
    """A Markdown table whose cells are code, so that their text is not rendered as markup."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    return "\n".join(
        [*lines, *(f"| {row[0]} | {_cell(row[1])} | {_cell(row[2])} |" for row in rows)]
    )


def _cell(text: str) -> str:
    return "`" + text.replace("`", "'").replace("|", "\\|").replace("\n", " ↵ ") + "`"
