"""Base of all datamodules: named training streams and an evaluation set, shared by the ranks.

Shapes: `B` prompts, `R` answer tokens.
"""

from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from temper.data import Batch, BatchSource, EvalSet, Stream, StreamLoader, fingerprint
from temper.data.streams import own_generator
from temper.errors import TemperError
from temper.judges import Judge, decode_rows
from temper.models.end_tokens import end_tokens


class StreamDataModule(L.LightningDataModule):
    """Base of all datamodules. Subclasses fill the attributes below in `setup`.

    A training batch is ``{stream name: rows}`` with the streams that the objective reads, or the
    primary one alone if it names none. Batch sizes are global, over all ranks. An epoch is one
    pass over the primary stream.

    Attributes:
        tokenizer: Known from construction on; the network is built for it.
        sources: Training streams by name, the primary one first.
        eval_rows: Prompts padded on the left, with ``kind`` (``B``, index into `eval_kinds`).
        eval_kinds: Kinds of the evaluation prompts: ``unsafe``, ``safe``, ``task``, ...
        probe_rows: Held-out rows whose loss the callback `ProbeLoss` follows, by name.
        judge: Judges answers to the evaluation prompts.
        max_new_tokens: Longest answer, in tokens.
        stop_ids: Tokens that end an answer beside those of the network; None: no others.
    """

    tokenizer: PreTrainedTokenizerBase
    sources: dict[str, BatchSource]
    eval_rows: Batch
    eval_kinds: list[str]
    probe_rows: dict[str, Batch]
    judge: Judge
    max_new_tokens: int
    stop_ids: list[int] | None = None

    def __init__(self, eval_batch_size: int, num_workers: int) -> None:
        super().__init__()
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.probe_rows = {}

    def train_dataloader(self) -> CombinedLoader:
        """One loader per stream, in step with each other.

        Raises:
            TemperError: the objective reads a stream that these data do not have, or a batch size
                is not divisible by the number of ranks.
        """
        assert self.trainer is not None
        objective: Any = self.trainer.lightning_module
        primary = next(iter(self.sources))
        names: tuple[str, ...] = objective.streams or (primary,)
        for name in names:
            if name not in self.sources:
                raise TemperError(
                    f"model={type(objective).__name__} reads the stream {name!r}, and"
                    f" data={type(self).__name__} has {', '.join(map(repr, self.sources))}; choose"
                    " data that have it"
                )
        epoch_batches = self.sources[primary].batches_per_pass
        loaders = {name: self._loader(name, self.sources[name], epoch_batches) for name in names}
        return CombinedLoader(loaders, mode="min_size")

    def _loader(self, name: str, source: BatchSource, epoch_batches: int) -> DataLoader[Batch]:
        rank, world_size = self._ranks()
        if source.batch_size % world_size:
            raise TemperError(
                f"stream {name!r}: batch size {source.batch_size} is global and not divisible by"
                f" {world_size} ranks; give a multiple of {world_size}, or other trainer.devices"
            )
        stream = Stream(source, epoch_batches, 0, rank, world_size)
        return StreamLoader(stream, self.position, self.num_workers)

    def position(self) -> int:
        """Number of batches that the run has finished; a resumed run has restored it before the
        first loader reads it.
        """
        assert self.trainer is not None
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(total.processed)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """A loader of the evaluation prompts, each once over all ranks; no loader if there are no
        prompts.
        """
        if not len(self.eval_rows["ids"]):
            return []
        return DataLoader(
            EvalSet(self.eval_rows, self.eval_batch_size, *self._ranks()),
            batch_size=None,
            generator=own_generator(),
        )

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def _ranks(self) -> tuple[int, int]:
        """This rank and the number of ranks; (0, 1) without a Trainer."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def end_tokens(self) -> list[int]:
        """All tokens that end an answer: `stop_ids`, and those of the network that is run."""
        module: Any = self.trainer.lightning_module if self.trainer else None
        return end_tokens(getattr(module, "network", None), self.stop_ids or ())

    def prompt_texts(self, batch: Batch) -> list[str]:
        """Evaluation prompts as judges read them."""
        return decode_rows(self.tokenizer, batch["input_ids"])

    def answer_texts(self, ids_BR: Tensor) -> list[str]:
        """Answers as judges read them."""
        return decode_rows(self.tokenizer, ids_BR)

    def correct(self, batch: Batch, answers: list[str]) -> list[bool | None]:
        """Whether answers to evaluation prompts are right; None where the data have no reference
        answer, and the judge decides.
        """
        return [None] * len(answers)

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of every stream and of the evaluation prompts, for the run card."""
        streams = {name: source.fingerprint() for name, source in self.sources.items()}
        return streams | {"eval": fingerprint(self.eval_rows)}
