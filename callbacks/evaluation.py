"""What callbacks that evaluate share: answers as text, refusals, and a word when a fit ends without
an evaluation.
"""

from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from temper.errors import TemperError


def answers_as_text(data: Any, outputs: Any) -> list[str]:
    """What a validation step returned, as text.

    Args:
        data: The datamodule; its ``answer_texts`` reads ids.
        outputs: Answers to a batch: B x R ids, or B texts, as `StoredAnswers` has them.
    """
    return outputs if isinstance(outputs, list) else data.answer_texts(outputs)  # type: ignore[no-any-return]


def refuse_without(callback: L.Callback, pl_module: L.LightningModule, *parts: str) -> None:
    """Refuse, before anything runs, a module that lacks what a callback uses of it: `StoredAnswers`
    has no network.

    Args:
        callback: Named in the message.
        pl_module: The module.
        parts: Names of attributes and methods.

    Raises:
        TemperError: it lacks one.
    """
    for part in parts:
        if not hasattr(pl_module, part):
            raise TemperError(
                f"{type(callback).__name__}: model={type(pl_module).__name__} has no {part}, which"
                " the callback needs; drop the callback"
            )


class EvaluationCallback(L.Callback):
    """Base of callbacks that measure at validation; they set ``evaluated`` when they have."""

    def __init__(self) -> None:
        self.evaluated = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget evaluations of earlier fits."""
        self.evaluated = False

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if nothing was evaluated: Lightning skips validation that is due after the last
        step in silence.
        """
        if not self.evaluated and trainer.limit_val_batches != 0:  # 0: switched off by name
            rank_zero_warn(
                f"{type(self).__name__}: nothing was evaluated in this fit; give"
                " --trainer.val_check_interval (at most the number of steps), or run `validate` on"
                " the export"
            )
