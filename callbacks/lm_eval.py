"""General abilities, by lm-evaluation-harness."""

import logging
import math
from collections.abc import Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from rich.table import Table

from callbacks.evaluation import EvaluationCallback, refuse_without
from temper.errors import TemperError, did_you_mean
from temper.packages import install_command
from temper.run_folder import write_json

# MERGED from callbacks.lm_eval: Tasks of lm-evaluation-harness: found by name, and refused where a
# tokenizer cannot tell their choices apart.


LOOKED_AT = 100  # rows of a task
NO_WORDS = (
    "qzvxk",
    "jwqpf",
)  # in no vocabulary: a tokenizer that tells them apart makes tokens of parts of words


def task_manager(tasks: Sequence[str], include_path: str | None) -> Any:
    """The harness's index of tasks; its own, which takes half a minute to read, only where a task
    is not in ``include_path``.

    Raises:
        TemperError: lm-eval is not installed, or a task is in none of them.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise TemperError(
            f"UtilityEvaluation needs lm-eval ({error}): {install_command('lm_eval')}, or drop the"
            " callback"
        ) from None
    if include_path is not None:
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=include_path)
    for task in tasks:
        if task not in manager.all_tasks:
            hint = did_you_mean(
                task, manager.all_tasks, "see `python -m lm_eval ls tasks`, or give include_path"
            )
            raise TemperError(
                f"UtilityEvaluation.tasks: no task or group is named {task!r}; {hint}"
            )
    return manager


def check_choices(manager: Any, tasks: Sequence[str], tokenizer: Any) -> None:
    """Refuse multiple-choice tasks of which different choices are the same tokens: they tie, and
    accuracy says nothing of the network.

    Only a vocabulary of whole words makes one token of all words that it does not know; with any
    other tokenizer no task is read here.

    Args:
        manager: As `task_manager` gives it.
        tasks: Names of tasks or groups.
        tokenizer: That of the network.

    Raises:
        TemperError: such a task.
    """
    if _tokens(tokenizer, NO_WORDS[0]) != _tokens(tokenizer, NO_WORDS[1]):
        return
    with isolate_rng():
        loaded = manager.load(list(tasks))["tasks"]
    for name, task in loaded.items():
        if task.OUTPUT_TYPE != "multiple_choice":
            continue
        rows = [set(task.doc_to_choice(row)) for row in islice(task.eval_docs, LOOKED_AT)]
        tied = sum(
            len({_tokens(tokenizer, choice) for choice in choices}) < len(choices)
            for choices in rows
        )
        if tied:
            raise TemperError(
                f"UtilityEvaluation.tasks: in {tied} of the first {len(rows)} rows of {name!r} the"
                " tokenizer makes the same tokens of different choices, which nothing can tell"
                " apart then; measure a model whose tokenizer knows the words of the task, give a"
                " task in its language, or drop the callback"
            )


def _tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


UTILITY = "utility.json"


class UtilityEvaluation(EvaluationCallback):
    """Accuracy on benchmarks of lm-evaluation-harness (the package ``lm-eval``), measured on the
    network in memory.

    At the end of a validation or test; logs ``utility/<task>/<metric>`` for the tasks asked for and
    writes ``utility.json`` (those, and the parts of groups) to the run folder. A task is one of the
    harness's own, whose data come from the Hugging Face hub, or a YAML file of yours, for which
    ``dataset_path: json`` needs no hub (``configs/lm_eval/colours.yaml``).

    Under several ranks the first one measures and the others wait, for as long as their process
    group lets them (30 minutes by default): validate an export on one device for long benchmarks.
    Random numbers of training stay as they were.

    Args:
        tasks: Names of tasks or groups.
        include_path: Folder with task files of your own; they are looked at first, and the
            harness's own tasks only if need be.
        limit: Rows per task, or a share of them below 1; null takes all. For a quick look, not for
            figures to report.
        num_fewshot: Solved examples in front of each question; null takes each task's own number,
            which stays 0 where a task says 0. ``utility.json`` has the number that was used.
        batch_size: Sequences at a time.
        apply_chat_template: Ask through the tokenizer's chat template.

    Raises:
        TemperError: lm-eval is not installed, no such task, a number out of range, a module without
            network, or a tokenizer that makes the same tokens of different choices, as the
            synthetic language's does of all English words.
    """

    def __init__(
        self,
        tasks: list[str],
        include_path: str | None = None,
        limit: float | None = None,
        num_fewshot: int | None = None,
        batch_size: int = 8,
        apply_chat_template: bool = False,
    ) -> None:
        super().__init__()
        if (
            not tasks
            or batch_size < 1
            or (limit is not None and limit <= 0)
            or (num_fewshot is not None and num_fewshot < 0)
        ):
            raise TemperError(
                f"UtilityEvaluation: tasks={tasks}, batch_size={batch_size}, limit={limit},"
                f" num_fewshot={num_fewshot}: give at least one task, a batch size of at least 1, a"
                " limit above 0 or null, and examples from 0 on or null"
            )
        if include_path is not None and not Path(include_path).is_dir():
            raise TemperError(
                f"UtilityEvaluation.include_path={include_path}: no such folder; give one with task"
                " files (YAML), or null"
            )
        self.tasks, self.include_path, self.batch_size = tasks, include_path, batch_size
        self.settings = {
            "limit": limit,
            "num_fewshot": num_fewshot,
            "apply_chat_template": apply_chat_template,
        }
        self.manager: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the tasks, before anything is trained."""
        if getattr(trainer.strategy, "shards_weights", False):
            raise TemperError(
                "UtilityEvaluation: one rank runs the harness, and under"
                f" {type(trainer.strategy).__name__} no rank has all weights; drop the callback,"
                " and run train.py validate with it on the export"
            )
        if stage == "predict" or not trainer.is_global_zero:
            return
        refuse_without(self, pl_module, "network")
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        if self.settings["apply_chat_template"] and tokenizer.chat_template is None:
            raise TemperError(
                "UtilityEvaluation.apply_chat_template=true: the tokenizer of the data has no chat"
                " template; set it to false"
            )
        if self.manager is None:
            self.manager = task_manager(self.tasks, self.include_path)
            check_choices(self.manager, self.tasks, tokenizer)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, log, write, print."""
        if trainer.sanity_checking:
            return
        self.evaluated = True
        found = None
        if trainer.is_global_zero:
            with (
                isolate_rng(),
                trainer.precision_plugin.forward_context(),
            ):  # the harness seeds every generator
                found = self._measure(pl_module.network, trainer.datamodule.tokenizer)  # type: ignore[attr-defined]
        found = trainer.strategy.broadcast(found)
        values = {
            f"utility/{task}/{name}": f["value"]
            for task in self.tasks
            for name, f in found.get(task, {}).get("metrics", {}).items()
        }
        pl_module.log_dict(
            {name: torch.tensor(value) for name, value in values.items()}, rank_zero_only=True
        )
        if trainer.is_global_zero:
            about = {"step": trainer.global_step, "lm_eval": version("lm-eval"), **self.settings}
            write_json(Path(trainer.default_root_dir) / UTILITY, about | {"tasks": found})
            if trainer.state.fn in ("validate", "test"):
                _print({task: found[task] for task in self.tasks if task in found})

    on_test_epoch_end = on_validation_epoch_end

    def _measure(self, network: Any, tokenizer: Any) -> dict[str, dict[str, Any]]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        logging.disable(logging.WARNING)  # it warns, every time, of options that are not used here
        try:
            model = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=self.batch_size)
        finally:
            logging.disable(logging.NOTSET)
        said = simple_evaluate(
            model=model,
            tasks=self.tasks,
            task_manager=self.manager,
            log_samples=False,
            **self.settings,
        )
        return {
            task: {
                "metrics": read_metrics(results),
                "n": said["n-samples"].get(task, {}).get("effective"),
                "n_shot": said["n-shot"].get(task),
                "version": said["versions"].get(task),
            }
            for task, results in {**said["results"], **said.get("groups", {})}.items()
        }


def read_metrics(results: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """``value`` and ``stderr`` (None: not known) by metric, from the harness's
    ``{"acc,none": ..., "acc_stderr,none": ...}``.

    A metric that is computed in several ways is named ``metric/filter``, such as
    ``exact_match/strict-match``.
    """
    found: dict[str, dict[str, float | None]] = {}
    for key, value in results.items():
        metric, comma, how = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = results.get(f"{metric}_stderr,{how}")
        known = isinstance(stderr, float) and not math.isnan(stderr)
        found[metric if how == "none" else f"{metric}/{how}"] = {
            "value": float(value),
            "stderr": stderr if known else None,
        }
    return found


def _print(tasks: dict[str, dict[str, Any]]) -> None:
    table = Table(title="Utility (lm-evaluation-harness)")
    for column in ("Task", "Metric", "Value", "Standard error", "n"):
        table.add_column(column, justify="left" if column in ("Task", "Metric") else "right")
    for task, found in tasks.items():
        for name, f in found["metrics"].items():
            stderr = "" if f["stderr"] is None else f"{f['stderr']:.3f}"
            table.add_row(task, name, f"{f['value']:.3f}", stderr, str(found["n"] or ""))
    Console().print(table)
