"""Tasks of lm-evaluation-harness: found by name, and refused where a tokenizer cannot tell their choices apart."""

import difflib
from collections.abc import Sequence
from itertools import islice
from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng

from temper.errors import TemperError

LOOKED_AT = 100  # rows of a task
NO_WORDS = ("qzvxk", "jwqpf")  # in no vocabulary: a tokenizer that tells them apart makes tokens of parts of words


def task_manager(tasks: Sequence[str], include_path: str | None) -> Any:
    """The harness's index of tasks; its own, which takes half a minute to read, only where a task is not in ``include_path``.

    Raises:
        TemperError: lm-eval is not installed, or a task is in none of them.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise TemperError(f"UtilityEvaluation needs lm-eval ({error}): pip install -e '.[lm-eval]', or drop the callback") from None
    if include_path is not None:
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=include_path)
    for task in tasks:
        if task not in manager.all_tasks:
            close = difflib.get_close_matches(task, manager.all_tasks, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see `python -m lm_eval ls tasks`, or give include_path"
            raise TemperError(f"UtilityEvaluation.tasks: no task or group is named {task!r}; {hint}")
    return manager


def check_choices(manager: Any, tasks: Sequence[str], tokenizer: Any) -> None:
    """Refuse multiple-choice tasks of which different choices are the same tokens: they tie, and accuracy says nothing of the network.

    Only a vocabulary of whole words makes one token of all words that it does not know; with any other tokenizer no task is
    read here.

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
        tied = sum(len({_tokens(tokenizer, choice) for choice in choices}) < len(choices) for choices in rows)
        if tied:
            raise TemperError(
                f"UtilityEvaluation.tasks: in {tied} of the first {len(rows)} rows of {name!r} the tokenizer makes the same tokens of "
                "different choices, which nothing can tell apart then; measure a model whose tokenizer knows the words of the task, give a "
                "task in its language, or drop the callback"
            )


def _tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))
