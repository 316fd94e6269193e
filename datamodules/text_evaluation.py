"""Evaluation on a user's prompts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from datamodules.base import StreamDataModule
from temper.data import Batch, pad_left
from temper.data.encode import Encoder, EncodeReport
from temper.data.examples import Example
from temper.data.files import ReadReport
from temper.errors import TemperError

KINDS = ("unsafe", "safe", "task")  # of evaluation prompts


@dataclass(frozen=True)
class TextFile:
    """A file of examples.

    Args:
        path: Where it is.
        reads: What its examples depend on beside its content; part of the key of cached tokens.
        read: Its examples, counted in a report.
        layout: Its layout in words, or what it is if that does not depend on its columns.
    """

    path: str
    reads: str
    read: Callable[[ReadReport], Iterator[Example]]
    layout: Callable[[], str]


class TextEvaluation(StreamDataModule):
    """What evaluation asks of data that are text. Subclasses set the attributes below before
    `setup_evaluation`.

    Attributes:
        encoder: Makes tokens of prompts.
        eval_files: Prompts to evaluate on, by kind.
        n_eval: The first so many of each kind that fit are used.
        reports: What became of the rows of every file, by name.
        eval_examples: The evaluation prompts as they were read, in the order of `eval_rows`.
    """

    encoder: Encoder
    eval_files: dict[str, TextFile]
    n_eval: int
    reports: dict[str, EncodeReport]
    eval_examples: list[Example]

    def setup_evaluation(self) -> None:
        """Read the evaluation prompts."""
        self.eval_kinds = list(self.eval_files)
        self.eval_examples: list[Example] = []
        prompts, kinds = [], []
        for number, (kind, file) in enumerate(self.eval_files.items()):
            report, seen = EncodeReport(), ReadReport()
            for example, ids in islice(self.encoder.prompts(file.read(seen), report), self.n_eval):
                self.eval_examples.append(example)
                prompts.append(ids)
                kinds.append(number)
            report.broken = seen.n_broken
            if not report.kept:
                raise TemperError(
                    f"data.init_args.{kind}={file.path}: {report}; give prompts of at most"
                    " max_length tokens"
                )
            report.layout = file.layout()
            if (
                self.reports.get(kind) != report
            ):  # Lightning calls setup before validation and again before a fit
                rank_zero_info(f"{kind}={file.path}: {report}")
            self.reports[kind] = report
        width = max(map(len, prompts), default=0)
        ids_BT = torch.tensor(
            [[*ids, *[-1] * (width - len(ids))] for ids in prompts], dtype=torch.long
        ).reshape(len(prompts), width)
        marks = {"ids": torch.arange(len(prompts)), "kind": torch.tensor(kinds, dtype=torch.long)}
        self.eval_rows = pad_left(ids_BT, ids_BT != -1, self.tokenizer.pad_token_id) | marks

    def kinds(self, batch: Batch) -> list[str]:
        """What the prompts of a batch are."""
        return [self.eval_kinds[i] for i in batch["kind"].tolist()]

    def prompt_texts(self, batch: Batch) -> list[str]:
        """The user's words, without template."""
        return [self.eval_examples[i].question for i in batch["ids"].tolist()]

    def answer_texts(self, ids_BR: Tensor) -> list[str]:
        """Answers without special tokens."""
        return [
            text.strip() for text in self.tokenizer.batch_decode(ids_BR, skip_special_tokens=True)
        ]

    def correct(self, batch: Batch, answers: list[str]) -> list[bool | None]:
        """Whether answers to task prompts are right."""
        known = zip(batch["ids"].tolist(), self.kinds(batch), strict=True)
        wanted = [self.eval_examples[i].reference if kind == "task" else None for i, kind in known]
        return [
            None if right is None else self.is_right(answer, right)
            for answer, right in zip(answers, wanted, strict=True)
        ]

    def is_right(self, answer: str, reference: str) -> bool:
        """Exact match, blanks around the texts aside."""
        return answer.strip() == reference.strip()
