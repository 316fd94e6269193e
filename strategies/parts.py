"""Checkpoints of strategies under which no rank holds all weights."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn

from temper.errors import TemperError
from temper.ranks import gather_objects
from temper.run_folder import replace_folder
from temper.sharded_checkpoint import (
    COMMON,
    WEIGHTS,
    Parts,
    is_in_parts,
    load_file,
    save_file,
    save_part,
)


class PartsCheckpoints:
    """Mixin of Lightning strategies: checkpoints are folders in parts
    (`temper.sharded_checkpoint`).
    """

    in_parts = True
    restore_checkpoint_after_setup = True
    lightning_restore_optimizer = False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: weights are in the parts."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing: it is in the parts."""
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: `load_checkpoint` did it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write a folder, all ranks together; under its name there is always a complete one.

        Raises:
            TemperError: a rank could not write its part; says which, and why. All ranks raise.
        """
        strategy: Any = self
        folder = Path(strategy.broadcast(str(filepath)))
        partial = folder.with_name(f".{folder.name}.partial")
        mistake = None
        try:
            self._save_part(checkpoint, partial)
        except TemperError as error:
            mistake = str(error)
        except Exception as error:  # whatever it is: the other ranks are not to wait for this one
            mistake = f"{type(error).__name__}: {error}"
        mistakes = gather_objects(mistake)
        if strategy.is_global_zero:
            if any(mistakes):
                shutil.rmtree(partial, ignore_errors=True)
            else:
                _replace(folder, partial)
        strategy.barrier("save_checkpoint")
        for rank, each in enumerate(mistakes):
            if each:
                raise TemperError(f"rank {rank}: {each}")

    def _save_part(self, checkpoint: dict[str, Any], folder: Path) -> None:
        strategy: Any = self
        weights, optimizer = strategy.lightning_module.weights, strategy.inner_optimizer()
        common = {
            key: value
            for key, value in checkpoint.items()
            if key not in ("state_dict", "optimizer_states", "vectors")
        }
        pieces, single_values = weights.pieces(optimizer, checkpoint.get("vectors", {}))
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        save_part(
            folder,
            strategy.global_rank,
            strategy.world_size,
            weights.shapes(),
            weights.ranges(),
            pieces,
        )
        if strategy.is_global_zero:
            save_file(
                common | {"single_values": single_values, "param_groups": groups}, folder / COMMON
            )

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Take this rank's pieces, whatever number of ranks and whichever of these strategies wrote
        them.

        Raises:
            TemperError: it is a single file; or is damaged, or of another network.
        """
        strategy: Any = self
        folder = Path(strategy.broadcast(str(checkpoint_path)))
        if not is_in_parts(folder):
            raise TemperError(
                f"ckpt_path={folder}: a checkpoint in one file, of one device or ddp, and this"
                " strategy reads checkpoints in parts; resume with the strategy that wrote it, or"
                " export it (train.py export) and start from that"
            )
        common, parts = load_file(folder / COMMON), Parts(folder)
        module = strategy.lightning_module
        if module.trainer.state.fn == TrainerFn.FITTING:
            optimizer = strategy.inner_optimizer()
            common["vectors"] = module.weights.load(parts, optimizer, common["single_values"])
            for group, saved in zip(optimizer.param_groups, common["param_groups"], strict=True):
                group.update(saved)
        else:
            self._load_weights(module, parts)
        return common | {"state_dict": {}, "optimizer_states": []}

    def _load_weights(self, module: Any, parts: Parts) -> None:
        parameters = dict(module.named_parameters())
        if wrong := [name for name in parts.shapes if name not in parameters]:
            raise TemperError(
                f"ckpt_path={parts.folder}: of another network, first at {wrong[0]!r}; give the"
                " config of its run"
            )
        for name in parts.shapes:
            self.put(parameters[name], parts.whole(WEIGHTS, name))  # type: ignore[attr-defined]


def _replace(folder: Path, partial: Path) -> None:
    """Give a complete checkpoint its name."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # of a run that was killed
    if folder.is_file():
        folder.unlink()
    replace_folder(folder, partial, old)
    shutil.rmtree(old, ignore_errors=True)
