"""Whether rows are packed for the forward pass, and what the forward pass needs to know for it."""

from typing import Any, ClassVar

import lightning.pytorch as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from temper.data import BatchSource
from temper.data.packing import Fill
from temper.data.rows import LENGTHS
from temper.errors import TemperError
from temper.models.blocks import count_weights
from temper.models.score import isolates_packed_sequences

PACKED_FROM = 1_000_000  # parameters; benchmarks/packing.md
FILL_BATCHES = 10  # of every stream, that the fill rate is measured on


class PackingMixin(L.LightningModule):
    """Packing for every objective: rows that carry their lengths are packed by
    `temper.models.score.score`.
    """

    #: Why the objective cannot have its rows packed, if it cannot.
    unpackable: ClassVar[str | None] = None
    network: nn.Module | None
    packing: bool | None
    micro_batch_size: int | None
    streams: ClassVar[tuple[str, ...] | None]

    def choose_packing(self, packing: bool | None) -> None:
        """Take the user's choice.

        Raises:
            TemperError: packing was asked for, and the objective cannot have it.
        """
        if packing and self.unpackable:
            raise TemperError(
                f"model.init_args.packing=true: {type(self).__name__} {self.unpackable}; set it to"
                " false, or leave it out"
            )
        self.packing = False if self.unpackable else packing

    def on_train_start(self) -> None:
        """Decide whether rows are packed, once the network is where it will compute."""
        self.packing = self._packs()
        if self.packing:
            sources = getattr(self.trainer.datamodule, "sources", {})  # type: ignore[attr-defined]
            for name in self.streams or tuple(sources)[:1]:
                rank_zero_info(
                    f"{name}: rows are packed; computed tokens that are no padding:"
                    f" {self._fill(sources[name])}"
                )

    def _packs(self) -> bool:
        assert self.network is not None
        if self.packing is None and count_weights(self.network.parameters()) < PACKED_FROM:
            return False
        if self.packing is False:
            return False
        with self.trainer.precision_plugin.forward_context():
            possible = isolates_packed_sequences(self.network)
        if self.packing and not possible:
            raise TemperError(
                "model.init_args.packing=true: packed sequences see each other in"
                f" {type(self.network).__name__} ({self.network.config.model_type}); set it to"
                " false, or leave it out"
            )
        return possible

    def _fill(self, source: BatchSource) -> str:
        """Fill rate without packing and with it, on the rows that a device has of the first
        batches.
        """
        assert self.network is not None
        padded, packed = Fill(), Fill(self.network.config.get_text_config().hidden_size)  # type: ignore[union-attr,operator]
        for k in range(min(FILL_BATCHES, source.batches_per_pass)):
            lengths = source.batch(k)["attention_mask"].sum(-1).numpy()
            for fill in (padded, packed):
                fill.add(
                    lengths, self.micro_batch_size or -(-len(lengths) // self.trainer.world_size)
                )
        return f"{padded.rate:.0%}, packed {packed.rate:.0%}"

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Note the rows' lengths while they are on the host; `temper.models.score.score` packs rows
        that carry them.
        """
        if not (self.trainer.training and self.packing):
            return batch
        return {
            stream: rows | {LENGTHS: rows["attention_mask"].sum(-1).numpy()}
            for stream, rows in batch.items()
        }
