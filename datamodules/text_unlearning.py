"""Unlearning data from files: answers to forget, and answers to keep."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info

from datamodules.text import TextDataModule
from temper.data import Batch, BatchSource, PoolSource, pair_rows, sequence
from temper.data.encode import EncodeReport
from temper.data.examples import Example
from temper.data.files import ReadReport
from temper.data.layouts import Want
from temper.data.pool import Pool
from temper.data.rows import stack_rows
from temper.data.token_pool import Row, TokenPool
from temper.errors import TemperError
from temper.losses import IGNORE_INDEX


class TextUnlearning(TextDataModule):
    """Streams ``forget`` (the answer to forget, and its substitute if the file has one) and
    ``retain``.

    The columns ``paraphrased_answer`` and ``perturbed_answer`` (a list) of TOFU's files are never
    trained on: `UnlearningEvaluation` computes truth ratios and forget quality of them.

    Args:
        forget: File of prompts with the answer to forget; with a column ``substitute`` (or ``idk``)
            rows have two sequences.
        retain: File of prompts with the answers to keep; null: no such stream.
        holdout: File like ``forget`` that is never trained on, for the callback
            `UnlearningEvaluation`; null: none.
        retain_substitutes: Read a column ``substitute`` of ``retain`` too, for the retain loss
            ``bounded``.
        batch_size: Forget rows per optimizer step, over all ranks.
        retain_batch_size: Retain rows per optimizer step, over all ranks.
        n_measured: Rows of each set that `UnlearningEvaluation` measures on, the first of the file.
        kwargs: See `TextDataModule`.
    """

    untrained: ClassVar = ("holdout",)
    one_answer: ClassVar = True

    def __init__(
        self,
        forget: str,
        retain: str | None = None,
        holdout: str | None = None,
        batch_size: int = 16,
        retain_batch_size: int = 16,
        n_measured: int = 200,
        retain_substitutes: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.batch_size = batch_size
        self.retain_batch_size = retain_batch_size
        self.n_measured = n_measured
        self.files["forget"] = self.text_file("forget", forget, "unlearning")
        if retain is not None:
            want: Want = "unlearning" if retain_substitutes else "unlearning_answer"
            self.files["retain"] = self.text_file("retain", retain, want)
        if holdout is not None:
            self.files["holdout"] = self.text_file("holdout", holdout, "unlearning_answer")

    def streams(self, pools: dict[str, TokenPool]) -> dict[str, BatchSource]:
        """Both streams."""
        made: dict[str, BatchSource] = {
            "forget": PoolSource(pools["forget"], self.batch_size, self.seed, "forget")
        }
        if "retain" in pools:
            made["retain"] = PoolSource(
                pools["retain"], self.retain_batch_size, self.seed + 1, "retain"
            )
        return made

    def unlearning_rows(self) -> dict[str, Batch]:
        """Rows that `callbacks.UnlearningEvaluation` measures on: prompts with their true answers,
        and with the paraphrased and the perturbed ones of the file.

        Raises:
            TemperError: a set has no file.
        """
        missing = [name for name in ("forget", "holdout", "retain") if name not in self._pools]
        if missing:
            raise TemperError(
                f"data.init_args.{missing[0]} is not set, and UnlearningEvaluation measures on it:"
                " give a file, or drop the callback"
            )
        return {name: self._measured(name) for name in ("forget", "holdout", "retain")}

    def _measured(self, name: str) -> Batch:
        """The first rows of a file of which all answers fit; where none of them has paraphrased or
        perturbed answers, the first rows that are trained.
        """
        report = EncodeReport()
        examples: list[Example] = []
        rows: list[Row] = []
        for example in self.files[name].read(ReadReport()):
            answers = (*example.answers[:1], *_known(example))
            for row in self.encoder.rows([replace(example, answers=answers)], report):
                examples.append(example)
                rows.append(row)
            if len(rows) == self.n_measured:
                break
        if not any(_known(example) for example in examples):
            return _answers(self._pools[name], self.n_measured)
        report.repeats = 0  # not counted: rows are encoded one by one
        rank_zero_info(
            f"{name}={self.files[name].path}: measured on {report};"
            f" {sum(example.paraphrase is not None for example in examples)} with a paraphrased"
            f" answer, {sum(bool(example.perturbed) for example in examples)} with perturbed ones"
        )
        paraphrased = torch.tensor([example.paraphrase is not None for example in examples])
        return self._padded(rows) | {"paraphrased": paraphrased}

    def _padded(self, rows: list[Row]) -> Batch:
        """Rows ``B x K x T``; a row with fewer than K answers has its first one without labels."""
        sequences = []
        for k in range(max(len(row.ids) for row in rows)):
            made = []
            for row in rows:
                there = k < len(row.ids)
                ids = torch.tensor(row.ids[k if there else 0])
                trained = torch.tensor(row.trained[k if there else 0])
                made.append(
                    {
                        "input_ids": ids[None],
                        "attention_mask": torch.ones_like(ids)[None],
                        "labels": ids.where(trained & there, IGNORE_INDEX)[None],
                    }
                )
            sequences.append(stack_rows(made))
        paired = pair_rows(*sequences)
        present = paired["attention_mask"].bool()
        pad_id: int = self.tokenizer.pad_token_id
        return paired | {"input_ids": paired["input_ids"].masked_fill(~present, pad_id)}


def _known(example: Example) -> tuple[str, ...]:
    """Answers of an example that are measured and not trained, the paraphrase first."""
    paraphrase = () if example.paraphrase is None else (example.paraphrase,)
    return (*paraphrase, *example.perturbed)


def _answers(pool: Pool, n_rows: int) -> Batch:
    """The first rows, without substitutes."""
    rows = pool[:n_rows]
    return sequence(rows, 0) if rows["input_ids"].ndim == 3 else rows
