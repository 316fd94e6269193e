"""Alignment data from files: answers and refusals to learn, and the harmful streams."""

from typing import Any

from datamodules.text import TextDataModule
from temper.data import BatchSource, PoolSource
from temper.data.pool import Pool, SequencesPool
from temper.data.token_pool import TokenPool


class TextAlignment(TextDataModule):
    """Streams ``alignment`` (refusals and helpful answers) and ``harmful`` (unsafe prompts carried
    out), each from a file.

    If their files are given, also ``harmful_pairs`` (for `RepNoiseModule`: the harmful answer
    first, the refusal second), and ``harmful_heldout`` with ``heldout_pairs`` (for `TARModule`: the
    harmful answers, and refusal first, harmful answer second).

    Args:
        alignment: File of prompts with the answers that the defender wants.
        harmful: File of unsafe prompts with answers that carry them out; null: no such stream.
        pairs: File of preference pairs on unsafe prompts (refusal preferred, harmful answer
            rejected); null: no such stream.
        heldout: As ``pairs``, on unsafe prompts that no other file has; null: no such streams.
        batch_size: Alignment rows per optimizer step, over all ranks.
        harmful_batch_size: Harmful rows per optimizer step, over all ranks.
        heldout_batch_size: Held-out rows per optimizer step, over all ranks.
        kwargs: See `TextDataModule`.
    """

    def __init__(
        self,
        alignment: str,
        harmful: str | None = None,
        pairs: str | None = None,
        heldout: str | None = None,
        batch_size: int = 16,
        harmful_batch_size: int = 16,
        heldout_batch_size: int = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.batch_size = batch_size
        self.harmful_batch_size = harmful_batch_size
        self.heldout_batch_size = heldout_batch_size
        self.files["alignment"] = self.text_file("alignment", alignment, "supervised")
        if harmful is not None:
            self.files["harmful"] = self.text_file("harmful", harmful, "supervised")
        for name, path in (("pairs", pairs), ("heldout", heldout)):
            if path is not None:
                self.files[name] = self.text_file(name, path, "preference")

    def streams(self, pools: dict[str, TokenPool]) -> dict[str, BatchSource]:
        """The streams of the files that were given."""
        made: dict[str, BatchSource] = {
            "alignment": PoolSource(pools["alignment"], self.batch_size, self.seed, "alignment")
        }
        for name, pool in _harmful(pools).items():
            made[name] = PoolSource(pool, self.harmful_batch_size, self.seed + 1, name)
        for name, pool in _heldout(pools).items():
            made[name] = PoolSource(pool, self.heldout_batch_size, self.seed + 2, name)
        return made


def _harmful(pools: dict[str, TokenPool]) -> dict[str, Pool]:
    """Rows of the harmful streams, by name."""
    found: dict[str, Pool] = {}
    if "harmful" in pools:
        found["harmful"] = pools["harmful"]
    if "pairs" in pools:
        found["harmful_pairs"] = SequencesPool(pools["pairs"], 1, 0)
    return found


def _heldout(pools: dict[str, TokenPool]) -> dict[str, Pool]:
    """Rows of the held-out streams, by name."""
    if "heldout" not in pools:
        return {}
    return {
        "harmful_heldout": SequencesPool(pools["heldout"], 1),
        "heldout_pairs": pools["heldout"],
    }
