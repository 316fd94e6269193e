"""Evaluation on a user's prompts: reading them, and comparing answers with the right ones."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.base import StreamDataModule
from temper.data import Batch, pad_left
from temper.data.encode import Encoder, EncodeReport
from temper.data.examples import Example
from temper.data.files import ReadReport
from temper.errors import TemperError
from temper.models.end_tokens import cut_at_end

KINDS = ("unsafe", "safe", "task")  # of evaluation prompts


@dataclass(frozen=True)
class TextFile:
    """A file of examples.

    Args:
        path: The file.
        reads: Settings that its examples depend on beside its content; part of the key of cached
            tokens.
        read: Gives its examples, counted in a report.
        layout: Gives its layout in words.
    """

    path: str
    reads: str
    read: Callable[[ReadReport], Iterator[Example]]
    layout: Callable[[], str]


class TextEvaluation(StreamDataModule):
    """Base of datamodules that evaluate on text prompts. Subclasses set the first four attributes
    below before `setup_evaluation`.

    Attributes:
        encoder: Makes tokens of prompts.
        eval_files: Prompts to evaluate on, by kind.
        n_eval: Prompts of each kind that are used: the first ones that fit.
        reports: Counts of the rows of every file that were kept, cut and left out, by name.
        eval_examples: The evaluation prompts as they were read, in the order of `eval_rows`; not
            there before `setup_evaluation`.
    """

    encoder: Encoder
    eval_files: dict[str, TextFile]
    n_eval: int
    reports: dict[str, EncodeReport]
    eval_examples: list[Example]

    def setup_evaluation(self) -> None:
        """Read the evaluation prompts, and make `eval_rows` of them; once, however often it is
        called.

        Raises:
            TemperError: a file cannot be read, or none of its prompts fits.
        """
        if hasattr(self, "eval_examples"):
            return
        examples: list[Example] = []
        prompts: list[list[int]] = []
        kinds: list[int] = []
        for number, (kind, file) in enumerate(self.eval_files.items()):
            for example, ids in self._read_prompts(kind, file):
                examples.append(example)
                prompts.append(ids)
                kinds.append(number)
        width = max(map(len, prompts), default=0)
        ids_BT = torch.tensor(
            [[*ids, *[-1] * (width - len(ids))] for ids in prompts], dtype=torch.long
        ).reshape(len(prompts), width)
        marks = {"ids": torch.arange(len(prompts)), "kind": torch.tensor(kinds, dtype=torch.long)}
        pad_id: int = self.tokenizer.pad_token_id
        self.eval_rows = pad_left(ids_BT, ids_BT != -1, pad_id) | marks
        self.eval_kinds = list(self.eval_files)
        self.eval_examples = examples

    def _read_prompts(self, kind: str, file: TextFile) -> list[tuple[Example, list[int]]]:
        """The first `n_eval` prompts of a file that fit, with their tokens."""
        report = EncodeReport()
        seen = ReadReport()
        prompts = list(islice(self.encoder.prompts(file.read(seen), report), self.n_eval))
        report.add_broken(seen)
        if not report.kept:
            way_out = (
                "give prompts of at most max_length tokens" if report.dropped else "fix its rows"
            )
            raise TemperError(f"data.init_args.{kind}={file.path}: {report}; {way_out}")
        report.layout = file.layout()
        rank_zero_info(f"{kind}={file.path}: {report}")
        self.reports[kind] = report
        return prompts

    def direction_prompts(self) -> dict[str, Batch]:
        """Prompts for the callback `RefusalAblation`: the unsafe and safe evaluation prompts of the
        first half, by a hash of the user's words, so that equal requests are in one half.

        Raises:
            TemperError: there are no prompts of one of these kinds.
        """
        missing = {"unsafe", "safe"} - set(self.eval_kinds)
        if missing:
            raise TemperError(
                f"RefusalAblation: needs unsafe and safe evaluation prompts; give"
                f" data.init_args.{min(missing)}"
            )
        kinds = self.kinds(self.eval_rows)
        found = {}
        for wanted in ("unsafe", "safe"):
            chosen = [
                number
                for number, (kind, example) in enumerate(
                    zip(kinds, self.eval_examples, strict=True)
                )
                if kind == wanted and in_first_half(example.question)
            ]
            found[wanted] = {
                name: value[chosen]
                for name, value in self.eval_rows.items()
                if name in ("input_ids", "attention_mask", "ids")
            }
        return found

    def examples_by_kind(self) -> dict[str, list[Example]]:
        """The evaluation prompts as they were read, by kind."""
        found: dict[str, list[Example]] = {kind: [] for kind in self.eval_kinds}
        for example, kind in zip(self.eval_examples, self.kinds(self.eval_rows), strict=True):
            found[kind].append(example)
        return found

    def kinds(self, batch: Batch) -> list[str]:
        """Kind of every prompt of a batch."""
        return [self.eval_kinds[i] for i in batch["kind"].tolist()]

    def prompt_texts(self, batch: Batch) -> list[str]:
        """The user's words, without template."""
        return [self.eval_examples[i].question for i in batch["ids"].tolist()]

    def answer_texts(self, ids_BR: Tensor) -> list[str]:
        """Answers up to their first end token, flagged special or not, without special tokens."""
        ends = self.end_tokens()
        answers = [cut_at_end(ids, ends) for ids in ids_BR.tolist()]
        return [
            text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)
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


def in_first_half(text: str) -> bool:
    """Whether a text is in the first half of all texts, by its hash."""
    return hashlib.sha256(text.strip().encode()).digest()[0] < 128
