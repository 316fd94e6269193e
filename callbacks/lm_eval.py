"""General abilities, measured with lm-evaluation-harness: its tasks, the callback, its metrics."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from rich.table import Table

from callbacks.evaluation import EvaluationCallback, data_of, refuse_without
from temper.errors import TemperError, did_you_mean
from temper.models.end_tokens import end_tokens
from temper.models.generate import decoding_greedily
from temper.packages import install_command
from temper.run_folder import write_json

UTILITY = "utility.json"
N_CHECKED = 100  # rows of each task whose choices are checked
# Two words that are in no vocabulary: a tokenizer that encodes them differently splits words.
UNKNOWN_WORDS = ("qzvxk", "jwqpf")


class UtilityEvaluation(EvaluationCallback):
    """Measure benchmarks of lm-evaluation-harness (the package ``lm-eval``) on the network in
    memory.

    At the end of a validation or test, logs ``utility/<task>/<metric>`` for the given tasks and
    writes ``utility.json`` (the given tasks, and the members of groups) to the run folder. A task
    is one of the harness's own, whose data come from the Hugging Face hub, or a YAML file of yours,
    for which ``dataset_path: json`` needs no hub (``configs/lm_eval/colours.yaml``).

    Under several ranks the first one measures and the others wait until the timeout of their
    process group (30 minutes by default): for long benchmarks, validate an export on one device.
    The random numbers of training do not change.

    Args:
        tasks: Names of tasks or groups.
        include_path: Folder with task files of your own; the harness's own tasks are read only if
            a task is not in it.
        limit: Rows per task, or a share of them below 1; null takes all. For a quick check, not for
            metrics to report.
        num_fewshot: Solved examples in front of each question; null takes each task's own number.
            A task that sets 0 keeps 0. ``utility.json`` has the number that was used.
        batch_size: Sequences per forward pass.
        apply_chat_template: Whether questions are put into the tokenizer's chat template.

    Raises:
        TemperError: lm-eval is not installed, there is no such task, a number is out of range, the
            module has no network, or the tokenizer makes the same tokens of different choices, as
            that of the synthetic language does of all English words.
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
                " limit above 0 or null, and num_fewshot of at least 0 or null"
            )
        if include_path is not None and not Path(include_path).is_dir():
            raise TemperError(
                f"UtilityEvaluation.include_path={include_path}: no such folder; give one with task"
                " files (YAML), or null"
            )
        self.tasks = tasks
        self.include_path = include_path
        self.batch_size = batch_size
        self.settings = {
            "limit": limit,
            "num_fewshot": num_fewshot,
            "apply_chat_template": apply_chat_template,
        }
        self.manager: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the tasks and check their choices, before anything is trained."""
        if getattr(trainer.strategy, "shards_weights", False):
            raise TemperError(
                "UtilityEvaluation: one rank runs the harness, and under"
                f" {type(trainer.strategy).__name__} no rank has all weights; drop the callback,"
                " and run train.py validate with it on the export"
            )
        if stage == "predict" or not trainer.is_global_zero:
            return
        refuse_without(self, pl_module, "network")
        tokenizer = data_of(trainer).tokenizer
        if self.settings["apply_chat_template"] and tokenizer.chat_template is None:
            raise TemperError(
                "UtilityEvaluation.apply_chat_template=true: the tokenizer of the data has no chat"
                " template; set it to false"
            )
        if self.manager is None:
            self.manager = task_manager(self.tasks, self.include_path)
            check_choices(self.manager, self.tasks, tokenizer)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure on the first rank, log, write the file, and print."""
        if trainer.sanity_checking:
            return
        self.evaluated = True
        found: dict[str, dict[str, Any]] = {}
        if trainer.is_global_zero:
            # The harness seeds every random generator.
            with isolate_rng(), trainer.precision_plugin.forward_context():
                found = self._measure(pl_module.network, data_of(trainer).tokenizer)
        found = trainer.strategy.broadcast(found)
        values = {
            f"utility/{task}/{name}": torch.tensor(metric["value"])
            for task in self.tasks
            for name, metric in found.get(task, {}).get("metrics", {}).items()
        }
        pl_module.log_dict(values, rank_zero_only=True)
        if trainer.is_global_zero:
            content = {
                "step": trainer.global_step,
                "lm_eval": version("lm-eval"),
                **self.settings,
                "tasks": found,
            }
            write_json(Path(trainer.default_root_dir) / UTILITY, content)
            if trainer.state.fn in ("validate", "test"):
                _print({task: found[task] for task in self.tasks if task in found})

    on_test_epoch_end = on_validation_epoch_end

    def _measure(self, network: Any, tokenizer: Any) -> dict[str, dict[str, Any]]:
        """Metrics, row and shot counts and version of every task and member of a group, by name."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with _no_warnings():  # HFLM warns of options that are not used here
            model = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=self.batch_size)
        # Tasks say how they decode; what the network's generation config adds is no part of them.
        ends = end_tokens(network, [tokenizer.eos_token_id])
        with decoding_greedily(network, ends, tokenizer.pad_token_id) as config:
            config.return_dict_in_generate = False
            results = simple_evaluate(
                model=model,
                tasks=self.tasks,
                task_manager=self.manager,
                log_samples=False,
                **self.settings,
            )
        return {
            task: {
                "metrics": read_metrics(found),
                "n": results["n-samples"].get(task, {}).get("effective"),
                "n_shot": results["n-shot"].get(task),
                "version": results["versions"].get(task),
            }
            for task, found in {**results["results"], **results.get("groups", {})}.items()
        }


@contextmanager
def _no_warnings() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


# -- tasks of the harness


def task_manager(tasks: Sequence[str], include_path: str | None) -> Any:
    """The harness's index of tasks. The harness's own tasks, which take half a minute to read, are
    in it only if a task is not in ``include_path``.

    Raises:
        TemperError: lm-eval is not installed, or there is no task of a given name.
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
    """Refuse multiple-choice tasks in which different choices have the same tokens: they tie, and
    accuracy says nothing about the network.

    That happens only with a vocabulary of whole words, which encodes all unknown words alike; with
    any other tokenizer no task is read here.

    Args:
        manager: From `task_manager`.
        tasks: Names of tasks or groups.
        tokenizer: The network's tokenizer.

    Raises:
        TemperError: a task has such choices in its first rows.
    """
    first, second = UNKNOWN_WORDS
    if _tokens(tokenizer, first) != _tokens(tokenizer, second):
        return
    with isolate_rng():
        loaded = manager.load(list(tasks))["tasks"]
    for name, task in loaded.items():
        if task.OUTPUT_TYPE != "multiple_choice":
            continue
        rows = [set(task.doc_to_choice(row)) for row in islice(task.eval_docs, N_CHECKED)]
        tied = sum(
            len({_tokens(tokenizer, choice) for choice in choices}) < len(choices)
            for choices in rows
        )
        if tied:
            raise TemperError(
                f"UtilityEvaluation.tasks: in {tied} of the first {len(rows)} rows of {name!r} the"
                " tokenizer makes the same tokens of different choices, so the network cannot"
                " distinguish them; measure a model whose tokenizer knows the words of the task,"
                " give a task in its language, or drop the callback"
            )


def _tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


# -- results of the harness


def read_metrics(results: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Read the metrics of a task from the harness's ``{"acc,none": ..., "acc_stderr,none": ...}``.

    Returns:
        ``value`` and ``stderr`` (None where the harness has none) by metric. A metric of answers
        that went through a named filter is ``metric/filter``, such as ``exact_match/strict-match``.
    """
    found: dict[str, dict[str, float | None]] = {}
    for key, value in results.items():
        metric, comma, answer_filter = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = results.get(f"{metric}_stderr,{answer_filter}")
        known = isinstance(stderr, float) and not math.isnan(stderr)
        found[metric if answer_filter == "none" else f"{metric}/{answer_filter}"] = {
            "value": float(value),
            "stderr": stderr if known else None,
        }
    return found


def _print(tasks: dict[str, dict[str, Any]]) -> None:
    table = Table(title="Utility (lm-evaluation-harness)")
    for column in ("Task", "Metric", "Value", "Standard error", "n"):
        table.add_column(column, justify="left" if column in ("Task", "Metric") else "right")
    for task, found in tasks.items():
        for name, metric in found["metrics"].items():
            stderr = "" if metric["stderr"] is None else f"{metric['stderr']:.3f}"
            table.add_row(task, name, f"{metric['value']:.3f}", stderr, str(found["n"] or ""))
    Console().print(table)
