"""Keep the answers of a prediction, for any judge to read later."""

from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from callbacks.evaluation import answers_as_text
from temper.ranks import gather_objects
from temper.run_folder import ANSWERS, write_json_lines


class SaveAnswers(L.Callback):
    """Write ``answers.jsonl`` to the run folder under ``predict``: one line per evaluation prompt.

    A line has ``id``, ``kind``, ``prompt`` and ``response``, in the order of the ids, and
    ``correct`` where the datamodule knows the right answer; no judge is asked. `StoredAnswers`
    hands the answers to judges. ``python train.py predict`` always has this callback; data without
    evaluation prompts (no ``prompt_texts``) leave no file.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start anew."""
        self.rows = []

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch: texts, or B x R ids of a module with a prediction step of its own."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "prompt_texts"):
            return
        responses = answers_as_text(data, outputs)
        rows = zip(
            batch["ids"].tolist(),
            batch["kind"].tolist(),
            data.prompt_texts(batch),
            responses,
            data.correct(batch, responses),
            strict=True,
        )
        for number, kind, prompt, response, correct in rows:
            row = {"id": number, "kind": data.eval_kinds[kind]}
            row |= {"prompt": prompt, "response": response}
            self.rows.append(row if correct is None else row | {"correct": correct})

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the answers of all ranks on the first one."""
        rows = sorted(chain.from_iterable(gather_objects(self.rows)), key=lambda row: row["id"])
        if trainer.is_global_zero and rows:
            path = Path(trainer.default_root_dir) / ANSWERS
            write_json_lines(path, rows)
            print(f"{len(rows)} answers written to {path}")
