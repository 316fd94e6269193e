"""Sharded checkpoints: a folder with one file per rank, for weights that no rank holds whole.

    step=100.ckpt/common.pt    everything that is the same on all ranks, rank 0's copy
    step=100.ckpt/part-0.pt    rank 0's shard of every weight, and of every tensor shaped like it
    step=100.ckpt/part-1.pt    ...

A shard is a range of the flattened tensor. However a strategy shards (FSDP2 by rows, ZeRO by flat
partitions), the shards of all ranks in a row are the whole tensor. So a checkpoint can be read by
another number of ranks, by another strategy, or as whole tensors.

From the disk up: `save_shard` and `ShardedCheckpoint` write and read the files;
`ShardedParameters` collects the shards of one rank's weights and optimizer state, and loads them
back; `ShardedCheckpointMixin` makes a Lightning strategy save and load such folders.

The file names, and the keys ``pieces`` and ``single_values`` in the files, are older than the words
used here, and are kept so that earlier checkpoints can be read.
"""

import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from temper.checkpoint_file import load_file, save_file
from temper.errors import TemperError
from temper.output_folder import (
    delete_files,
    is_regular,
    list_files,
    replace_folder,
    resolve_target,
)
from temper.ranks import gather_objects

COMMON = "common.pt"
# All files of a sharded checkpoint, those included that a killed process did not finish.
OWN_FILE = re.compile(r"(common|part-\d+)\.pt|\.(common|part-\d+)\.pt\.partial")
# Kinds of shards: one of the weights, one per tensor that the optimizer keeps for each weight, one
# per vector that an objective keeps between steps.
WEIGHTS = "weights"
OPTIMIZER = "optimizer."
VECTOR = "vector."

Ranges = Mapping[str, tuple[int, int]]
Shards = Mapping[str, Mapping[str, Tensor]]
Scalars = dict[str, Any]


def is_sharded(path: str | Path) -> bool:
    """Whether a path is a sharded checkpoint."""
    return (Path(path) / COMMON).is_file()


def _shard_file(folder: Path, rank: int) -> Path:
    return folder / f"part-{rank}.pt"


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, a file or a folder, and nothing else that has its name.

    Raises:
        TemperError: the folder holds other files than a sharded checkpoint's.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if problem := find_foreign_file(path):
        raise TemperError(f"checkpoint {path}: not deleted, since it {problem}; move that away")
    delete_files(path, list(list_files(path)))


def find_foreign_file(folder: Path) -> str:
    """In what a folder is more than a sharded checkpoint; empty if in nothing."""
    for name in list_files(folder) if folder.is_dir() else ():
        if not (OWN_FILE.fullmatch(name) and is_regular(folder / name)):
            return f"holds {name!r}, which is no file of a checkpoint"
    return ""


# -- files


def save_shard(
    folder: Path,
    rank: int,
    world_size: int,
    shapes: Mapping[str, list[int]],
    ranges: Ranges,
    shards: Shards,
) -> None:
    """Write the file of one rank.

    Args:
        folder: The checkpoint's.
        rank: The writer's.
        world_size: Number of ranks.
        shapes: Whole shape of every weight.
        ranges: First and last element (exclusive) of each weight's shard, in the flattened weight.
        shards: By kind (``weights``, ``optimizer.exp_avg``, ...) and name of the weight: flat
            tensors of the ranges' lengths.
    """
    content = {
        "world_size": world_size,
        "shapes": dict(shapes),
        "ranges": {name: list(bounds) for name, bounds in ranges.items()},
        "pieces": {
            kind: {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
            for kind, tensors in shards.items()
        },
    }
    save_file(content, _shard_file(folder, rank))


class ShardedCheckpoint:
    """Reads tensors, or ranges of them, from the shards of all ranks. Files are mapped, not loaded.

    Args:
        folder: A sharded checkpoint.

    Raises:
        TemperError: a file is missing or damaged, or holds more than tensors and plain values.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        first = load_file(_shard_file(folder, 0))
        others = [load_file(_shard_file(folder, rank)) for rank in range(1, first["world_size"])]
        self._files = [first, *others]
        self.shapes: dict[str, list[int]] = first["shapes"]

    @property
    def kinds(self) -> set[str]:
        """The kinds of shards that it holds."""
        return {kind for file in self._files for kind in file["pieces"]}

    def names(self, kind: str) -> list[str]:
        """Weights that have shards of a kind."""
        return [
            name
            for name in self.shapes
            if any(name in file["pieces"].get(kind, {}) for file in self._files)
        ]

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` (exclusive) of a flattened tensor.

        Raises:
            TemperError: the shards do not hold all of them.
        """
        found = []
        for file in self._files:
            first, last = file["ranges"][name]
            low = max(first, start)
            high = min(last, stop)
            if low < high:
                found.append((low, file["pieces"][kind][name][low - first : high - first]))
        shards = [shard for _, shard in sorted(found, key=lambda each: each[0])]
        if sum(len(shard) for shard in shards) != max(stop - start, 0):
            raise TemperError(
                f"ckpt_path={self.folder}: not all of {name} ({kind}) is in its"
                f" {len(self._files)} shards; the checkpoint is damaged"
            )
        return torch.cat(shards) if shards else torch.empty(0)

    def whole(self, kind: str, name: str) -> Tensor:
        """A tensor in its own shape."""
        shape = self.shapes[name]
        return self.read(kind, name, 0, int(torch.Size(shape).numel())).view(shape)

    def weights(self) -> dict[str, Tensor]:
        """All trained weights, whole: the ``state_dict`` of a single-file checkpoint."""
        return {name: self.whole(WEIGHTS, name) for name in self.shapes}


# -- one rank's shards


class ShardedParameters(ABC):
    """Trainable weights of which one rank holds shards: collects them for saving, loads them back.

    A strategy's weight space says how it shards in the abstract methods.
    """

    names: list[str]
    parameters: list[nn.Parameter]

    def shapes(self) -> dict[str, list[int]]:
        """Whole shape of every weight (``ds_shape`` is ZeRO-3's, which empties the weight)."""
        return {
            name: list(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in zip(self.names, self.parameters, strict=True)
        }

    @abstractmethod
    def ranges(self) -> dict[str, tuple[int, int]]:
        """First and last element (exclusive) of this rank's shard of every weight, in the flattened
        weight.
        """

    @abstractmethod
    def _optimizer_tensors(self) -> list[Tensor]:
        """Tensors that the optimizer steps: the keys of its state."""

    @abstractmethod
    def _flat_shards(self, tensors: list[Tensor]) -> list[Tensor]:
        """Flat views of tensors shaped like `_optimizer_tensors`, one per parameter."""

    @abstractmethod
    def _owner(self, number: int) -> int:
        """Index in `_optimizer_tensors` of the tensor that holds a parameter."""

    @abstractmethod
    def _local_weights(self) -> list[Tensor]:
        """This rank's shard of the weights that forward passes use."""

    @abstractmethod
    def _master_weights_changed(self) -> None:
        """Update the weights that forward passes use, after `_optimizer_tensors` were written."""

    def collect_shards(
        self, optimizer: Optimizer, vectors: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[dict[str, dict[str, Tensor]], list[Scalars]]:
        """This rank's shards by kind and weight, and the optimizer's scalars (step counts) of every
        weight.

        Raises:
            TemperError: the optimizer keeps a tensor that is not shaped like its weight.
        """
        ranges = self.ranges()
        tensors = self._optimizer_tensors()
        states = [dict(optimizer.state.get(tensor, {})) for tensor in tensors]
        _check_shapes(optimizer, tensors, states)
        shards = {WEIGHTS: dict(zip(self.names, self._flat_shards(tensors), strict=True))}
        shards |= self._optimizer_shards(states)
        for kind, vector in vectors.items():
            shards[VECTOR + kind] = {name: tensor.reshape(-1) for name, tensor in vector.items()}
        for kind, padded in shards.items():
            shards[kind] = {
                name: shard[: ranges[name][1] - ranges[name][0]] for name, shard in padded.items()
            }
        scalars = [
            {kind: value for kind, value in state.items() if not _is_elementwise(value)}
            for state in states
        ]
        return shards, [scalars[self._owner(number)] for number in range(len(self.names))]

    def _optimizer_shards(self, states: list[dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
        shards = {}
        kinds = [kind for state in states for kind in state if _is_elementwise(state[kind])]
        for kind in dict.fromkeys(kinds):
            flat = self._flat_shards([state.get(kind, torch.empty(0)) for state in states])
            shards[OPTIMIZER + kind] = {
                name: shard
                for number, (name, shard) in enumerate(zip(self.names, flat, strict=True))
                if kind in states[self._owner(number)]
            }
        return shards

    @torch.no_grad()
    def load_shards(
        self, checkpoint: ShardedCheckpoint, optimizer: Optimizer, scalars: list[Scalars]
    ) -> dict[str, dict[str, Tensor]]:
        """Load weights and optimizer state, whatever number of ranks wrote them.

        Returns:
            This rank's shards of an objective's vectors, by kind and weight.

        Raises:
            TemperError: the checkpoint is of other weights, or is damaged.
        """
        ranges = self.ranges()
        tensors = self._optimizer_tensors()
        if list(checkpoint.shapes) != self.names or checkpoint.shapes != self.shapes():
            raise TemperError(
                f"ckpt_path={checkpoint.folder}: of another network or adapter; give the config of"
                " the run that wrote it"
            )
        for name, shard in zip(self.names, self._flat_shards(tensors), strict=True):
            start, stop = ranges[name]
            shard[: stop - start].copy_(checkpoint.read(WEIGHTS, name, start, stop))
        self._master_weights_changed()
        for index, tensor in enumerate(tensors):
            owned = [n for n in range(len(self.names)) if self._owner(n) == index]
            if owned and scalars[owned[0]]:
                optimizer.state[tensor] = {
                    kind: value.clone() if isinstance(value, Tensor) else value
                    for kind, value in scalars[owned[0]].items()
                }
        for kind in sorted(kind for kind in checkpoint.kinds if kind.startswith(OPTIMIZER)):
            self._load_optimizer_shards(checkpoint, kind, optimizer)
        return {
            kind.removeprefix(VECTOR): self._load_vector(checkpoint, kind)
            for kind in checkpoint.kinds
            if kind.startswith(VECTOR)
        }

    def _load_optimizer_shards(
        self, checkpoint: ShardedCheckpoint, kind: str, optimizer: Optimizer
    ) -> None:
        tensors = self._optimizer_tensors()
        names = set(checkpoint.names(kind))
        ranges = self.ranges()
        owners = {self._owner(number) for number, name in enumerate(self.names) if name in names}
        loaded = [
            torch.zeros_like(tensor) if index in owners else torch.empty(0)
            for index, tensor in enumerate(tensors)
        ]
        for name, shard in zip(self.names, self._flat_shards(loaded), strict=True):
            if name in names:
                start, stop = ranges[name]
                shard[: stop - start].copy_(checkpoint.read(kind, name, start, stop))
        for index in owners:
            optimizer.state[tensors[index]][kind.removeprefix(OPTIMIZER)] = loaded[index]

    def _load_vector(self, checkpoint: ShardedCheckpoint, kind: str) -> dict[str, Tensor]:
        vector = {}
        weights = self._local_weights()
        for (name, (start, stop)), weight in zip(self.ranges().items(), weights, strict=True):
            dtype = torch.promote_types(weight.dtype, torch.float32)
            shard = torch.zeros(weight.numel(), dtype=dtype)
            shard[: stop - start].copy_(checkpoint.read(kind, name, start, stop))
            vector[name] = shard.view(weight.shape)
        return vector


def _is_elementwise(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _check_shapes(
    optimizer: Optimizer, tensors: list[Tensor], states: list[dict[str, Any]]
) -> None:
    for tensor, state in zip(tensors, states, strict=True):
        for kind, value in state.items():
            if _is_elementwise(value) and value.shape != tensor.shape:
                raise TemperError(
                    f"model.init_args.optimizer={type(optimizer).__name__}: its state {kind!r} is"
                    " not shaped like the weights, so it cannot be sharded; use torch.optim.AdamW"
                    " under this strategy"
                )


# -- Lightning strategies


class ShardedCheckpointMixin(ABC):
    """Mixin of Lightning strategies: checkpoints are sharded.

    Goes before the strategy in the list of bases. The module's ``weights`` must be
    `ShardedParameters`.
    """

    is_sharded = True

    @abstractmethod
    def inner_optimizer(self) -> Optimizer:
        """The optimizer that keeps the state."""

    @abstractmethod
    def write_whole(self, parameter: Tensor, whole: Tensor) -> None:
        """Write a whole weight into a sharded parameter; all ranks call it."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Shards are loaded into weights that are sharded already."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """`load_checkpoint` loads the optimizer's state."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: weights are in the shards."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: the optimizer's state is in the shards."""
        return {}

    def load_model_state_dict(  # noqa: B027 (not abstract: it overrides Lightning's)
        self, checkpoint: Mapping[str, Any], strict: bool = True
    ) -> None:
        """Nothing: `load_checkpoint` did it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write a folder, all ranks together; under its name there is always a complete one.

        Raises:
            TemperError: a rank could not write its shards; says which, and why. All ranks raise.
        """
        strategy: Any = self
        folder = Path(strategy.broadcast(str(filepath)))
        partial = folder.with_name(f".{folder.name}.partial")
        message = None
        try:
            resolve_target(partial, "checkpoint")  # through no link
            self._save_shards(checkpoint, partial)
        except TemperError as error:
            message = str(error)
        except Exception as error:  # of any kind: the other ranks must not wait for this one
            message = f"{type(error).__name__}: {error}"
        messages = gather_objects(message)
        if strategy.is_global_zero:
            if any(messages):
                shutil.rmtree(partial, ignore_errors=True)
            else:
                _replace_checkpoint(folder, partial)
        strategy.barrier("save_checkpoint")
        for rank, failure in enumerate(messages):
            if failure:
                raise TemperError(f"rank {rank}: {failure}")

    def _save_shards(self, checkpoint: dict[str, Any], folder: Path) -> None:
        strategy: Any = self
        weights: ShardedParameters = strategy.lightning_module.weights
        optimizer = self.inner_optimizer()
        shards, scalars = weights.collect_shards(optimizer, checkpoint.get("vectors", {}))
        save_shard(
            folder,
            strategy.global_rank,
            strategy.world_size,
            weights.shapes(),
            weights.ranges(),
            shards,
        )
        if strategy.is_global_zero:
            common = {
                key: value
                for key, value in checkpoint.items()
                if key not in ("state_dict", "optimizer_states", "vectors")
            }
            common["single_values"] = scalars
            common["param_groups"] = [
                {key: value for key, value in group.items() if key != "params"}
                for group in optimizer.param_groups
            ]
            save_file(common, folder / COMMON)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load this rank's shards, whatever number of ranks or sharded strategy wrote them.

        Raises:
            TemperError: it is a single file, is damaged, or is of another network.
        """
        strategy: Any = self
        folder = Path(strategy.broadcast(str(checkpoint_path)))
        if not is_sharded(folder):
            raise TemperError(
                f"ckpt_path={folder}: a single-file checkpoint, as one device and ddp write it, and"
                f" {type(self).__name__} reads sharded ones; resume with the strategy that wrote"
                " it, or export it (train.py export) and start from that"
            )
        common: dict[str, Any] = load_file(folder / COMMON)
        checkpoint = ShardedCheckpoint(folder)
        module = strategy.lightning_module
        if module.trainer.state.fn == "fit":
            weights: ShardedParameters = module.weights
            optimizer = self.inner_optimizer()
            common["vectors"] = weights.load_shards(checkpoint, optimizer, common["single_values"])
            for group, saved in zip(optimizer.param_groups, common["param_groups"], strict=True):
                group.update(saved)
        else:
            self._load_weights(module, checkpoint)
        return common | {"state_dict": {}, "optimizer_states": []}

    def _load_weights(self, module: nn.Module, checkpoint: ShardedCheckpoint) -> None:
        parameters = dict(module.named_parameters())
        if unknown := [name for name in checkpoint.shapes if name not in parameters]:
            raise TemperError(
                f"ckpt_path={checkpoint.folder}: of another network, first at {unknown[0]!r}; give"
                " the config of its run"
            )
        for name in checkpoint.shapes:
            self.write_whole(parameters[name], checkpoint.whole(WEIGHTS, name))


def _replace_checkpoint(folder: Path, partial: Path) -> None:
    """Give a complete checkpoint its name, in the place of an earlier one only.

    Raises:
        TemperError: there is a folder of that name with other files than a checkpoint's.
    """
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    target = resolve_target(folder, "checkpoint")
    replace_folder(target, target.with_name(partial.name), "checkpoint", find_foreign_file)
