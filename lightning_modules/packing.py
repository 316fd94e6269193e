"""Whether an objective's rows are packed for the forward pass."""

from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import rank_zero_info

from temper.data import Batch, BatchSource
from temper.data.packing import Fill
from temper.data.rows import LENGTHS
from temper.errors import TemperError
from temper.models.blocks import count_weights
from temper.models.tries import isolates_packed_sequences

if TYPE_CHECKING:
    from lightning_modules.base import ObjectiveModule

PACKED_FROM = 1_000_000  # parameters; smaller networks gain a tenth at most: benchmarks/packing.md
FILL_BATCHES = 10  # batches of every stream on which the fill rate is measured


class RowPacking:
    """The packing of one objective: chosen by the user, decided when training starts.

    Rows that carry their lengths are packed by `temper.models.score.score`; packing changes speed
    and memory, not losses or results.

    Args:
        choice: True, False, or None for where it helps and the network keeps sequences apart.
        objective: Name of the objective, for messages.
        unpackable: Why the objective cannot have its rows packed, if it cannot.

    Attributes:
        active: Whether rows are packed; None until training has started.

    Raises:
        TemperError: packing was chosen, and the objective cannot have it.
    """

    def __init__(self, choice: bool | None, objective: str, unpackable: str | None) -> None:
        if choice and unpackable:
            raise TemperError(
                f"model.init_args.packing=true: {objective} {unpackable}; set it to false, or leave"
                " it out"
            )
        self.choice = False if unpackable else choice
        self.active: bool | None = False if self.choice is False else None

    def decide(self, module: "ObjectiveModule") -> None:
        """Decide, once the network is on its device, and print the fill rate of every stream.

        Raises:
            TemperError: packing was chosen, and the network does not keep packed sequences apart.
        """
        self.active = self._is_possible(module)
        if self.active:
            sources = getattr(module.trainer.datamodule, "sources", {})  # type: ignore[attr-defined]
            for name in module.streams or tuple(sources)[:1]:
                rank_zero_info(
                    f"{name}: rows are packed; share of computed tokens that are not padding:"
                    f" {_fill_rates(module, sources[name])}"
                )

    def _is_possible(self, module: "ObjectiveModule") -> bool:
        network = module.policy
        if self.choice is False:
            return False
        if self.choice is None and count_weights(network.parameters()) < PACKED_FROM:
            return False
        with module.trainer.precision_plugin.forward_context():
            possible = isolates_packed_sequences(network)
        if self.choice and not possible:
            raise TemperError(
                "model.init_args.packing=true: packed sequences see each other in"
                f" {type(network).__name__} ({network.config.model_type}); set it to false, or"
                " leave it out"
            )
        return possible

    def with_lengths(self, batch: dict[str, Batch]) -> dict[str, Batch]:
        """The batch, with the lengths of rows that are to be packed; called on the host."""
        if not self.active:
            return batch
        return {
            stream: rows | {LENGTHS: rows["attention_mask"].sum(-1).numpy()}
            for stream, rows in batch.items()
        }


def _fill_rates(module: "ObjectiveModule", source: BatchSource) -> str:
    """Fill rate without and with packing, over one device's rows of the first batches."""
    padded = Fill()
    packed = Fill(module.policy.config.get_text_config().hidden_size)
    for k in range(min(FILL_BATCHES, source.batches_per_pass)):
        lengths = source.batch(k)["attention_mask"].sum(-1).numpy()
        n_rows = module.micro_batch_size or -(-len(lengths) // module.trainer.world_size)
        for fill in (padded, packed):
            fill.add(lengths, n_rows)
    return f"{padded.rate:.0%}, packed {packed.rate:.0%}"
