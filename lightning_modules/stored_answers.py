"""Answers of an earlier run, in place of a model."""

import json
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as L

from temper.data import Batch
from temper.errors import TemperError
from temper.run_folder import ANSWERS, GENERATIONS


class StoredAnswers(L.LightningModule):
    """Judge stored answers again, without a model:
    ``python train.py test --model StoredAnswers --model.init_args.path=runs/x``.

    Reads ``answers.jsonl``, which ``predict`` wrote, or ``generations.jsonl``, which
    `SafetyEvaluation` wrote, and hands the answers out for the prompts of the same data. Give
    another ``trainer.default_root_dir`` to keep the earlier judgements.

    Args:
        path: One of these files, or a run folder, of which the newer one is taken.
        tokenizer: Folder of the tokenizer, for text data that name none: other objectives take it
            from their network.

    Raises:
        TemperError: no such file, or a broken line; when it runs, prompts that are not those of the
            data; training.
    """

    def __init__(self, path: str, tokenizer: str | None = None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.file = _file(Path(path))
        self.stored = _read(self.file)

    def setup(self, stage: str) -> None:
        """Refuse to train, and answers to other prompts than those of the data."""
        if stage == "fit":
            _refuse()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        numbers = data.eval_rows["ids"].tolist()
        prompts = dict(zip(numbers, data.prompt_texts(data.eval_rows), strict=True))
        if self.stored.keys() != prompts.keys():
            example = min(self.stored.keys() ^ prompts.keys())
            found = (
                f"{len(self.stored)} answers to {len(prompts)} evaluation prompts of the data (id"
                f" {example} is in one of them only)"
            )
        else:
            different = [
                number for number in numbers if self.stored[number]["prompt"] != prompts[number]
            ]
            if not different:
                return
            found = (
                f"{len(different)} of {len(prompts)} prompts are not those of the data, the first"
                f" one id {different[0]}"
            )
        raise TemperError(
            f"model.init_args.path={self.file}: {found}; give the data (and seed) that the run was"
            " evaluated on"
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> Any:
        """Stored answers to the prompts of a batch, as text."""
        return [self.stored[number]["response"] for number in batch["ids"].tolist()]

    test_step = validation_step
    predict_step = validation_step

    def training_step(self, batch: Any, batch_idx: int) -> NoReturn:
        """Refused."""
        _refuse()

    def configure_optimizers(self) -> None:
        """None: there is nothing to train."""


def _file(path: Path) -> Path:
    """The file of a run folder that was written last."""
    if not path.is_dir():
        return path
    written = [file for name in (ANSWERS, GENERATIONS) if (file := path / name).is_file()]
    return max(written, key=lambda file: file.stat().st_mtime_ns, default=path / GENERATIONS)


def _read(file: Path) -> dict[int, dict[str, Any]]:
    """Rows by number."""
    if not file.is_file():
        raise TemperError(
            f"model.init_args.path={file}: no such file; give a run folder with {ANSWERS} (written"
            f" by `predict`) or {GENERATIONS} (by SafetyEvaluation)"
        )
    rows: dict[int, dict[str, Any]] = {}
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                texts = {"prompt": row["prompt"], "response": row["response"]}
                sound = (
                    isinstance(row["id"], int)
                    and row["id"] not in rows
                    and all(isinstance(text, str) for text in texts.values())
                )
            except (ValueError, TypeError, KeyError):
                sound = False
            if not sound:
                raise TemperError(
                    f"model.init_args.path={file}: line {number} is no answer (JSON with a new id,"
                    " prompt and response); evaluate the run again"
                )
            rows[row["id"]] = texts
    return rows


def _refuse() -> NoReturn:
    raise TemperError(
        "model=StoredAnswers has no weights, so it cannot be trained: use `test` or `validate`"
    )
