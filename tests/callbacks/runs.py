"""Evaluations without any side effect but the callback's own files, and the answers they leave."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L


def evaluate(
    folder: Path,
    callbacks: list[L.Callback],
    module: L.LightningModule,
    data: L.LightningDataModule,
    verb: str = "validate",
) -> L.Trainer:
    """Run ``validate`` or ``test`` once, in a run folder."""
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        callbacks=callbacks,
    )
    getattr(trainer, verb)(module, data, verbose=False)
    return trainer


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def read_generations(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's generations.jsonl."""
    return read_rows(folder / "generations.jsonl")
