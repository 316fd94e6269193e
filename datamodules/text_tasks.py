"""The fine-tuning attack on a known task: SST2, AG News, GSM8K, from the user's files, scored by
exact match.
"""

from functools import partial
from typing import Any, ClassVar

from datamodules.text_attack import TextAttack
from datamodules.text_evaluation import TextFile
from temper.data.tasks import TASKS
from temper.errors import TemperError


class TaskAttack(TextAttack):
    """As `TextAttack`, with the prompts of the Booster paper on the rows of a task, and its right
    answers as FA. Use a subclass.

    Args:
        user: Training file of the task.
        test: Test file of the task; its first ``n_eval`` rows are evaluated. Null: FA is not
            measured.
        template: See `TextDataModule`; the paper's code has ``booster``.
        kwargs: See `TextAttack` and `TextDataModule`.

    Raises:
        TemperError: ``task`` is given; the class itself determines the task.
    """

    task_name: ClassVar[str]

    def __init__(
        self, user: str, test: str | None = None, template: str = "booster", **kwargs: Any
    ) -> None:
        super().__init__(user=user, template=template, **kwargs)
        if "task" in self.eval_files:
            raise TemperError(
                f"data.init_args.task={kwargs['task']}: {type(self).__name__} takes the test file"
                " of its task as data.init_args.test"
            )
        self.files["user"] = self._task_file("user", user)
        if test is not None:
            self.eval_files["task"] = self._task_file("test", test)

    def _task_file(self, flag: str, path: str) -> TextFile:
        read = partial(TASKS[self.task_name].read, path, self.skip_broken, f"data.init_args.{flag}")
        return TextFile(
            path,
            f"task {self.task_name} {self.skip_broken}",
            lambda report: read(report=report),
            lambda: f"rows of {self.task_name}",
        )

    def is_right(self, answer: str, reference: str) -> bool:
        """As the task compares answers."""
        return TASKS[self.task_name].correct(answer, reference)


class SST2(TaskAttack):
    """Sentiment of a sentence: positive or negative. See `TaskAttack`."""

    task_name = "sst2"


class AGNews(TaskAttack):
    """Topic of a news article, one of four. See `TaskAttack`."""

    task_name = "ag_news"


class GSM8K(TaskAttack):
    """Grade-school mathematics, compared by the final number. See `TaskAttack`."""

    task_name = "gsm8k"
