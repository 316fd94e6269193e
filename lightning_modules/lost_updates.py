"""Whether weights of 16 bits are too coarse for an optimizer: measured at its first steps.

A bfloat16 weight has 8 significant bits: an update below 1/512 of the weight's size leaves it as it
was. At a learning rate of 1e-5, Adam's updates are lost in all weights above 0.005.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from strategies import Vector, WeightSpace

STEPS = 3  # optimizer steps that are measured
SAMPLED = 2**14  # elements of each weight that are looked at, at most
LEAST_SHARE = 0.25  # of lost updates that is warned about
WARM = 0.5  # of its base value, that the learning rate must have reached


class LostUpdates:
    """Measures the share of weight elements that the first optimizer steps leave unchanged although
    their gradient is not zero, and warns if it is large; once in a fit.

    Only weights that the optimizer itself holds in 16 bits are looked at: LoRA adapters, networks
    in float32, and ZeRO's float32 copies lose nothing. Under FSDP2 every rank measures its shards.
    While a schedule warms the learning rate up, nothing is measured: updates are smaller then.

    Attributes:
        share: The measured share; None until it is known, and where nothing is measured.
    """

    def __init__(self) -> None:
        self.share: float | None = None
        self._steps_left = STEPS
        self._sums: Tensor | None = None

    @contextmanager
    def measured(self, weights: WeightSpace, optimizer: Any, gradient: Vector) -> Iterator[None]:
        """Measure the optimizer step that is taken inside the ``with`` block.

        Args:
            weights: The weights that are stepped.
            optimizer: Steps them.
            gradient: The gradient that the optimizer was given.
        """
        if self._steps_left == 0:
            yield
            return
        stepped = weights.master_weights()
        coarse = [i for i, weight in enumerate(stepped) if weight.element_size() <= 2]
        # Every rank of a sharded strategy holds shards, if empty ones, of the same weights.
        if not coarse:
            self._steps_left = 0
        if not coarse or not _is_warm(optimizer):
            yield
            return
        before = [_sample(stepped[i]).clone() for i in coarse]
        given = [_sample(gradient.tensors[i]) != 0 for i in coarse]
        yield
        sums = torch.zeros(2, device=gradient.tensors[0].device)
        for i, start, is_given in zip(coarse, before, given, strict=True):
            lost = (_sample(weights.master_weights()[i]) == start).to(is_given.device) & is_given
            each = stepped[i].numel() / max(1, start.numel())  # elements that one stands for
            sums += each * torch.stack([lost.sum(), is_given.sum()]).to(sums)
        self._sums = sums if self._sums is None else self._sums + sums
        self._steps_left -= 1
        if self._steps_left == 0:
            self._tell(weights, stepped[coarse[0]].dtype, _rate(optimizer))

    def _tell(self, weights: WeightSpace, dtype: torch.dtype, rate: float) -> None:
        assert self._sums is not None
        lost, given = weights.sum_over_shards(self._sums).tolist()
        if not given:
            return
        self.share = lost / given
        if self.share >= LEAST_SHARE:
            name = str(dtype).removeprefix("torch.")
            rank_zero_warn(
                f"{self.share:.0%} of the weight elements with a gradient did not change in the"
                f" first {STEPS} optimizer steps: at a learning rate of {rate:.2g} their updates"
                f" are below the precision of {name} and are lost. Keep the weights in float32"
                " (model.network.dtype=float32, with trainer.precision=bf16-mixed for speed), train"
                " a LoRA adapter (model.network.lora.rank=16), or raise the learning rate"
            )


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = getattr(optimizer, "optimizer", optimizer).param_groups
    return groups


def _rate(optimizer: Any) -> float:
    """The largest learning rate."""
    return max((float(group["lr"]) for group in _groups(optimizer)), default=math.nan)


def _is_warm(optimizer: Any) -> bool:
    return any(
        group["lr"] > 0 and group["lr"] >= WARM * group.get("initial_lr", group["lr"])
        for group in _groups(optimizer)
    )


def _sample(weight: Tensor) -> Tensor:
    """At most `SAMPLED` elements, evenly spread."""
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // SAMPLED))]
