"""The callback that saves and restores an objective's counters and the random generators."""

import random
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_modules.work import Work
from temper.ranks import gather_objects


class ResumeState(L.Callback):
    """Saves and restores an objective's counters and the random generators of every rank.

    Every objective brings it (`ObjectiveModule.configure_callbacks`). Generators are restored when
    the first batch has been fetched: loaders draw from them at moments that a resumed run has more
    of.
    """

    def __init__(self) -> None:
        self._random: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Add the counters, and work and generators of every rank. All ranks call it."""
        checkpoint["counters"] = {
            "skipped_steps": pl_module.skipped_steps,
            "in_a_row": pl_module.skipped_in_a_row,
        }
        own = {"work": pl_module.work.state_dict(), "random": random_state()}
        checkpoint["ranks"] = gather_objects(own)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the counters of a fit; keep this rank's generators for the first batch."""
        if trainer.state.fn != "fit":  # an evaluation counts nothing, and a file may lack them
            return
        pl_module.skipped_steps = checkpoint["counters"]["skipped_steps"]
        pl_module.skipped_in_a_row = checkpoint["counters"]["in_a_row"]
        ranks = checkpoint["ranks"]
        rank = trainer.global_rank
        if len(ranks) == trainer.world_size:
            pl_module.work = Work(**ranks[rank]["work"])
            self._random = ranks[rank]["random"]
            return
        rank_zero_warn(
            f"the checkpoint is of {len(ranks)} ranks, and there are {trainer.world_size} now:"
            " dropout goes on with other random numbers"
        )
        pl_module.work = Work.from_ranks([each["work"] for each in ranks], rank)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore the random generators before the first step after a resume."""
        self._restore()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore them before a validation that comes first: a run that was interrupted before one
        resumes with it.
        """
        if not trainer.sanity_checking:
            self._restore()

    def _restore(self) -> None:
        if self._random is not None:
            restore_random_state(self._random)
            self._random = None


# -- random generators


def random_state() -> dict[str, Any]:
    """State of Python's, NumPy's and torch's generators, as tensors and plain values.

    Of GPUs, the generator of the current device.
    """
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
    """Set every generator to a state from `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    key, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
