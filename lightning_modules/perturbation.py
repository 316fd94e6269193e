"""Vaccine's perturbation: the direction that raises the loss most, added to outputs of blocks.

Shapes: `B` rows, `T` tokens, `D` width, `L` blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.base import ObjectiveModule
from strategies import Vector
from temper.data import Batch, micro_batches
from temper.losses import MeanTerms
from temper.models.blocks import refuse_reentrant


@dataclass(frozen=True)
class OutputGradients:
    """Gradient of the *summed* loss of a batch with respect to the outputs of L blocks.

    Attributes:
        gradients: ``B x T x D`` tensors by micro-batch and block, in the precision of the outputs.
        norms_L: L2 norm of each block's gradient over all rows, tokens, micro-batches and ranks,
            nats.
        loss: The global mean loss, nats per token.
    """

    gradients: list[list[Tensor]]
    norms_L: Tensor
    loss: Tensor

    @property
    def norm(self) -> Tensor:
        """L2 norm over all blocks together."""
        norm: Tensor = torch.linalg.vector_norm(self.norms_L)
        return norm


@dataclass(frozen=True)
class PerturbedGradient:
    """Losses and gradient of the pass that finds a perturbation and the pass under it.

    Attributes:
        loss: Mean loss without the perturbation, nats per token.
        perturbed_loss: Mean loss with it.
        gradient: Gradient of ``perturbed_loss`` over the weights.
        norm: L2 norm of the first pass's gradient over all block outputs; must be finite for a
            step.
    """

    loss: Tensor
    perturbed_loss: Tensor
    gradient: Vector
    norm: Tensor

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Metrics that a step logs."""
        return {"vaccine/perturbed_loss": self.perturbed_loss, "vaccine/gradient_norm": self.norm}


def perturbed_gradient(
    module: ObjectiveModule,
    blocks: Sequence[nn.Module],
    rows: Batch,
    rho: float,
    reduced: bool = True,
) -> PerturbedGradient:
    """Gradient of the mean NLL with ``e_l = rho * g_l / ||(g_1, ..., g_L)||`` added to the output
    of block l.

    ``g_l`` is the gradient of the summed NLL with respect to that output, so ``e`` does not depend
    on how a batch is cut into micro-batches and ranks; e is a constant in the second pass. Between
    the passes, ``L x B x T x D`` numbers are held for this rank's whole batch. Where all g are
    exactly zero, nothing is added. With dropout above 0 the two passes draw different masks.

    Args:
        module: Gives loss, micro-batch size and weights.
        blocks: Modules whose (first) output is perturbed.
        rows: This rank's rows.
        rho: L2 norm of the perturbation over blocks, rows, tokens and ranks.
        reduced: As in `ObjectiveModule.gradient`.
    """
    found = output_gradients(module, blocks, rows)
    length = found.norm.clamp_min(torch.finfo(found.norm.dtype).tiny)
    waiting = found.gradients[::-1]
    found.gradients.clear()  # so that each is freed once its micro-batch has been used
    now: list[Tensor] = []

    def loss(micro_batch: Batch) -> MeanTerms:
        now[:] = waiting.pop()
        return module.nll_terms(micro_batch)

    def perturbation(block: int, output: Tensor) -> Tensor:
        return (now[block].to(length.dtype) / length * rho).to(output.dtype)

    # In force until the backward passes are over too: activation checkpointing runs blocks again in
    # them.
    with added(blocks, perturbation):
        perturbed_loss, gradient = module.gradient(rows, loss, reduced)
    return PerturbedGradient(found.loss, perturbed_loss, gradient, found.norm)


def output_gradients(
    module: ObjectiveModule, blocks: Sequence[nn.Module], rows: Batch
) -> OutputGradients:
    """One pass without weight gradients; counted as a forward-backward pass.

    Zeros that have a gradient of their own are added to the outputs. So it does not matter which
    weights learn, and autograd keeps no activations for them.

    Raises:
        TemperError: the network checkpoints activations in the re-entrant way.
    """
    module.work.count_pass(rows)
    gradients = []
    sums = []
    with module.weights.frozen():
        for micro_batch in micro_batches(rows, module.micro_batch_size):
            zeros: dict[int, Tensor] = {}
            with added(blocks, partial(_zero, zeros)):
                terms = module.nll_terms(micro_batch)
                gradients.append(
                    list(
                        torch.autograd.grad(
                            terms.total, [zeros[block] for block in range(len(blocks))]
                        )
                    )
                )
            exact = torch.promote_types(terms.total.dtype, torch.float32)
            squares = [
                torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)).to(
                    exact
                )
                ** 2
                for g in gradients[-1]
            ]
            sums.append(
                torch.stack([*squares, terms.total.detach().to(exact), terms.count.to(exact)])
            )
    if not sums:
        raise ValueError("gradient of an empty batch: a stream handed out no rows")
    *squares_L, total, count = module.weights.global_sum(torch.stack(sums).sum(0))
    return OutputGradients(gradients, torch.stack(squares_L).sqrt(), total / count)


@contextmanager
def added(blocks: Sequence[nn.Module], term: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """While it lasts, ``term(l, output)`` is added to the output of block l, to the first one if it
    has several.

    A block may run more than once per forward pass: ``term`` must give the same then.
    """

    def add(block: int, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + term(block, output[0]), *output[1:])
        return output + term(block, output)

    hooks = [
        module.register_forward_hook(partial(add, block)) for block, module in enumerate(blocks)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _zero(zeros: dict[int, Tensor], block: int, output: Tensor) -> Tensor:
    refuse_reentrant()
    if block not in zeros:
        zeros[block] = torch.zeros_like(output, requires_grad=True)
    return zeros[block]
