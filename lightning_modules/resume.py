"""What a resumed run takes up again beside weights and optimizer: counters, and every rank's random
generators.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from strategies import WeightSpace
from temper.ranks import gather_objects

# MERGED from lightning_modules.resume: The state of every global random generator, as tensors and
# plain values.


def random_state() -> dict[str, Any]:
    """State of Python's, NumPy's and torch's generators (each device's that is in use)."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    state = {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [
            torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            numpy["state"]["pos"],
            numpy["has_gauss"],
            numpy["gauss"],
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put generators where `random_state` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    key, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.long)


@dataclass
class Work:
    """What training has done so far on this rank: cost figures that need no clock.

    Attributes:
        passes: Forward-backward passes over a batch.
        tokens: Tokens in them, padding not counted (int64 scalar on the device: no
            synchronisation).
        forwards: Forward passes without a backward one: reference models, importance, statistics.
        forward_tokens: Tokens in those.
    """

    passes: int = 0
    tokens: Tensor = field(default_factory=_zero)
    forwards: int = 0
    forward_tokens: Tensor = field(default_factory=_zero)


class ResumeMixin(L.LightningModule):
    """State between steps. Vectors that an objective keeps go to ``checkpoint["vectors"]``, by
    weight: strategies cut and join them.
    """

    _weights: WeightSpace | None

    def __init__(self) -> None:
        super().__init__()
        self.skipped_in_a_row = self.skipped_steps = 0
        self.work = Work()
        self._resumed_random: dict[str, Any] | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters and the random generators of every rank; refuse while the weights are
        displaced. All ranks call it.
        """
        if self._weights is not None and self._weights.is_displaced:
            raise RuntimeError(
                "a checkpoint was asked for while the weights are displaced; ask again after the"
                " training step"
            )
        checkpoint["counters"] = {
            "skipped_steps": self.skipped_steps,
            "in_a_row": self.skipped_in_a_row,
        }
        work = {
            name: value.cpu() if isinstance(value, Tensor) else value
            for name, value in vars(self.work).items()
        }
        checkpoint["ranks"] = gather_objects({"work": work, "random": random_state()})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counters up again, and the generators of this rank once the first batch has been
        fetched.
        """
        counters, ranks = checkpoint["counters"], checkpoint["ranks"]
        self.skipped_steps, self.skipped_in_a_row = counters["skipped_steps"], counters["in_a_row"]
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        works = [Work(**each["work"]) for each in ranks]
        if len(ranks) == world_size:
            self.work, self._resumed_random = works[rank], ranks[rank]["random"]
            return
        rank_zero_warn(
            f"the checkpoint is of {len(ranks)} ranks, and there are {world_size} now: dropout goes"
            " on with other random numbers"
        )
        # Tokens are summed over ranks in the end, so one rank carries those of all that were.
        tokens = sum(work.tokens for work in works) if rank == 0 else _zero()
        forward_tokens = sum(work.forward_tokens for work in works) if rank == 0 else _zero()
        self.work = Work(works[0].passes, tokens, works[0].forwards, forward_tokens)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Before the first step after a resume: put the random generators where they were."""
        self._take_up_random()

    def on_validation_start(self) -> None:
        """The same if a validation comes first: a run that was stopped before one begins with
        it.
        """
        if not self.trainer.sanity_checking:
            self._take_up_random()

    def _take_up_random(self) -> None:
        if self._resumed_random is not None:
            restore_random_state(self._resumed_random)
            self._resumed_random = None
