"""Shared code of the callbacks: the interface of datamodules, answers as text, checks of modules,
and the base of callbacks that evaluate.

Shapes: `B` prompts, `R` answer tokens.
"""

from typing import Protocol

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from temper.data import Batch, BatchSource
from temper.errors import TemperError
from temper.judges import Judge


class StreamData(Protocol):
    """The part of a datamodule that callbacks read; `datamodules.StreamDataModule` documents it.

    A callback that needs more of a datamodule has a Protocol of its own for that, and checks it in
    its ``setup``.
    """

    tokenizer: PreTrainedTokenizerBase
    sources: dict[str, BatchSource]
    eval_rows: Batch
    eval_kinds: list[str]
    probe_rows: dict[str, Batch]
    judge: Judge

    def prompt_texts(self, batch: Batch) -> list[str]:
        """Evaluation prompts as judges read them."""
        ...

    def answer_texts(self, ids_BR: Tensor) -> list[str]:
        """Answers as judges read them."""
        ...

    def end_tokens(self) -> list[int]:
        """All tokens that end an answer."""
        ...

    def correct(self, batch: Batch, answers: list[str]) -> list[bool | None]:
        """Whether answers are right; None where the judge decides."""
        ...

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of every stream and of the evaluation prompts."""
        ...


def data_of(trainer: L.Trainer) -> StreamData:
    """The Trainer's datamodule."""
    data: StreamData = trainer.datamodule  # type: ignore[attr-defined]
    return data


def answers_as_text(data: StreamData, outputs: Tensor | list[str]) -> list[str]:
    """The answers that a validation step returned, as text.

    Args:
        data: The datamodule, which decodes ids.
        outputs: Answers to a batch: ``B x R`` ids, or ``B`` texts, as `StoredAnswers` has them.
    """
    return outputs if isinstance(outputs, list) else data.answer_texts(outputs)


def refuse_without(callback: L.Callback, pl_module: L.LightningModule, *names: str) -> None:
    """Refuse, before anything runs, a module without the attributes that a callback uses;
    `StoredAnswers`, for example, has no network.

    Args:
        callback: Named in the message.
        pl_module: The module.
        names: Names of attributes and methods.

    Raises:
        TemperError: the module lacks one of them.
    """
    for name in names:
        if not hasattr(pl_module, name):
            raise TemperError(
                f"{type(callback).__name__}: model={type(pl_module).__name__} has no {name}, which"
                " the callback needs; drop the callback"
            )


class EvaluationCallback(L.Callback):
    """Base of callbacks that measure at validation; they set ``evaluated`` to True once they have
    measured.
    """

    def __init__(self) -> None:
        self.evaluated = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget evaluations of earlier fits."""
        self.evaluated = False

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn if nothing was evaluated: Lightning silently skips a validation that is due after
        the last step.
        """
        if not self.evaluated and trainer.limit_val_batches != 0:  # 0: switched off by name
            rank_zero_warn(
                f"{type(self).__name__}: nothing was evaluated in this fit; give"
                " --trainer.val_check_interval (at most the number of steps), or run `validate` on"
                " the export"
            )
