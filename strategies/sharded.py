"""Weight space of a rank that holds a part of the weights."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.weight_space import Vector, WeightSpace
from temper.errors import TemperError
from temper.sharded_checkpoint import WEIGHTS, Parts

OPTIMIZER = "optimizer."  # kinds of pieces: the optimizer's state
VECTOR = "vector."  # and vectors that an objective keeps between steps


class ShardedWeightSpace(WeightSpace):
    """Gradients come averaged over ranks, each rank its part: nothing is left to reduce but small
    sums.
    """

    @property
    def world_size(self) -> int:  # type: ignore[override]
        """Number of ranks."""
        return dist.get_world_size()

    def norm(self, vector: Vector) -> Tensor:
        """Over the parts of all ranks: one all-reduce of a single number."""
        return self.sum_over_shards(
            torch.stack(torch._foreach_norm(vector.tensors)).square().sum()
        ).sqrt()

    def global_sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        dist.all_reduce(values)
        return values

    def sum_over_shards(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        dist.all_reduce(values)
        return values

    # -- checkpoints

    def shapes(self) -> dict[str, list[int]]:
        """Whole shape of every weight."""
        return {
            name: list(getattr(p, "ds_shape", p.shape))
            for name, p in zip(self.names, self.parameters, strict=True)
        }

    def ranges(self) -> dict[str, tuple[int, int]]:
        """First and last element (exclusive) of this rank's piece of every weight, in the flattened
        weight.
        """
        raise NotImplementedError

    def _optimized(self) -> list[Tensor]:
        """What the optimizer sees: the keys of its state."""
        raise NotImplementedError

    def _pieces(self, likes: list[Tensor]) -> list[Tensor]:
        """Flat views of tensors that are shaped like `_optimized`, one per parameter."""
        raise NotImplementedError

    def _owner(self, number: int) -> int:
        """Which of `_optimized` a parameter is in."""
        raise NotImplementedError

    def pieces(
        self, optimizer: Any, vectors: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[dict[str, dict[str, Tensor]], list[Any]]:
        """What this rank has to save, by kind and weight, and what belongs to each weight that is a
        single value (step counts).

        Raises:
            TemperError: the optimizer keeps something that is not shaped like the weights.
        """
        ranges, found, keys = self.ranges(), {}, self._optimized()
        found[WEIGHTS] = dict(zip(self.names, self._pieces(keys), strict=True))
        states = [dict(optimizer.state.get(key, {})) for key in keys]
        for kind in dict.fromkeys(
            kind for state in states for kind, value in state.items() if _elementwise(value)
        ):
            likes = [state.get(kind, torch.empty(0)) for state in states]
            have = [kind in states[self._owner(number)] for number in range(len(self.names))]
            found[OPTIMIZER + kind] = {
                name: piece
                for name, piece, has in zip(self.names, self._pieces(likes), have, strict=True)
                if has
            }
        for kind, tensors in vectors.items():
            found[VECTOR + kind] = {name: tensor.reshape(-1) for name, tensor in tensors.items()}
        for kind, of in found.items():
            found[kind] = {
                name: piece[: ranges[name][1] - ranges[name][0]] for name, piece in of.items()
            }
        for key, state in zip(keys, states, strict=True):
            if wrong := [
                kind
                for kind, value in state.items()
                if _elementwise(value) and value.shape != key.shape
            ]:
                raise TemperError(
                    f"model.init_args.optimizer={type(optimizer).__name__}: its state {wrong[0]!r}"
                    " is not shaped like the weights, so it cannot be saved in parts; use"
                    " torch.optim.AdamW under this strategy"
                )
        values = [
            {kind: value for kind, value in state.items() if not _elementwise(value)}
            for state in states
        ]
        return found, [values[self._owner(number)] for number in range(len(self.names))]

    @torch.no_grad()
    def load(
        self, parts: Parts, optimizer: Any | None, single_values: list[dict[str, Any]]
    ) -> dict[str, dict[str, Tensor]]:
        """Take weights and the optimizer's state from parts, whatever ranks wrote them; gives this
        rank's pieces of the vectors.
        """
        ranges, keys = self.ranges(), self._optimized()
        if list(parts.shapes) != self.names or parts.shapes != self.shapes():
            raise TemperError(
                f"ckpt_path={parts.folder}: of another network or adapter; give the config of the"
                " run that wrote it"
            )
        for name, exact in zip(self.names, self._pieces(keys), strict=True):
            start, stop = ranges[name]
            exact[: stop - start].copy_(parts.read(WEIGHTS, name, start, stop))
        self._adopt()
        kinds = parts.kinds
        if optimizer is not None:
            for number, key in enumerate(keys):
                names = [n for n in range(len(self.names)) if self._owner(n) == number]
                if names and single_values[names[0]]:
                    optimizer.state[key] = {
                        kind: _copy(value) for kind, value in single_values[names[0]].items()
                    }
            for kind in sorted(kind for kind in kinds if kind.startswith(OPTIMIZER)):
                self._load_state(parts, kind, optimizer)
        return {
            kind.removeprefix(VECTOR): self._vector(parts, kind)
            for kind in kinds
            if kind.startswith(VECTOR)
        }

    def _load_state(self, parts: Parts, kind: str, optimizer: Any) -> None:
        keys, names, ranges = self._optimized(), set(parts.names(kind)), self.ranges()
        owners = {self._owner(number) for number, name in enumerate(self.names) if name in names}
        likes = [
            torch.zeros_like(key) if number in owners else torch.empty(0)
            for number, key in enumerate(keys)
        ]
        for name, piece in zip(self.names, self._pieces(likes), strict=True):
            if name in names:
                start, stop = ranges[name]
                piece[: stop - start].copy_(parts.read(kind, name, start, stop))
        for number in owners:
            optimizer.state[keys[number]][kind.removeprefix(OPTIMIZER)] = likes[number]

    def _vector(self, parts: Parts, kind: str) -> dict[str, Tensor]:
        pieces = {}
        for (name, (start, stop)), held in zip(self.ranges().items(), self._held(), strict=True):
            piece = torch.zeros(held.numel(), dtype=torch.promote_types(held.dtype, torch.float32))
            piece[: stop - start].copy_(parts.read(kind, name, start, stop))
            pieces[name] = piece.view(held.shape)
        return pieces

    def _adopt(self) -> None:
        """Let forward passes use the exact weights, after those were changed."""
        self._written()


def _elementwise(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
