"""Whether rows, and prompts with their answers, are longer than the network's positions."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from temper.data import BatchSource
from temper.data.pool import MismatchedPool
from temper.errors import TemperError
from temper.models.positions import learns_positions, position_limit

if TYPE_CHECKING:
    from lightning_modules.base import ObjectiveModule


def check_positions(module: "ObjectiveModule", trains: bool) -> None:
    """Compare the longest row of every stream, and the longest prompt with the longest answer, with
    the positions of the network. Settings alone say nothing: only rows that are there count.

    Args:
        module: The objective, set up.
        trains: Whether its streams are read.

    Raises:
        TemperError: they are longer than the network's table of positions. With rotary positions a
            warning is given.
    """
    network = module.policy
    limit = position_limit(network.config)
    if limit is None:
        return
    for what, length, way_out in _lengths(module, trains, limit):
        if length <= limit:
            continue
        line = (
            f"{what} {length:,} tokens, and {type(network).__name__} has {limit:,} positions"
            f" (max_position_embeddings); {way_out}"
        )
        if learns_positions(network, limit):
            raise TemperError(line)
        rank_zero_warn(f"{line}. Beyond them its answers and losses mean little")


def _lengths(module: "ObjectiveModule", trains: bool, limit: int) -> Iterator[tuple[str, int, str]]:
    """What is how long, in tokens, and the way out."""
    data = module.datamodule
    encoder: Any = getattr(data, "encoder", None)
    given = "" if encoder is None else f"data.max_length={encoder.max_length}: "
    shorter = (
        f"give --data.max_length={limit}, or a model with more positions"
        if encoder is not None
        else "give a network with more (model.network.shape.max_length)"
    )
    sources: dict[str, BatchSource] = getattr(data, "sources", {}) if trains else {}
    for name in module.streams or tuple(sources)[:1]:
        if name in sources:
            longest = _longest(sources[name], limit)
            yield f"{given}the longest row of stream {name!r} has", longest, shorter
    if trains and module.trainer.limit_val_batches == 0:
        return
    prompts = getattr(data, "eval_rows", {}).get("attention_mask")
    if prompts is not None and len(prompts):
        longest = int(prompts.sum(-1).max())
        n_new = module.max_new_tokens or data.max_new_tokens
        yield (
            f"data.max_new_tokens={n_new}: with the longest evaluation prompt ({longest:,} tokens)"
            " that is",
            longest + n_new,
            f"give --data.max_new_tokens={limit - longest}" if longest < limit else shorter,
        )


def _longest(source: BatchSource, limit: int) -> int:
    """Tokens of the longest row; of streams without a pool, in their first batch."""
    pool: Any = getattr(source, "pool", None)
    if pool is None:
        return int(source.batch(0)["attention_mask"].sum(-1).max())
    if isinstance(pool, MismatchedPool):
        own = int(pool.pool.lengths.max())
        # Their lengths are found by reading all rows, so only where they may be too long.
        if min(pool.max_length, 2 * own) <= limit:
            return own
    return int(pool.lengths.max())
