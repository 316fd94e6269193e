"""Find the refusal direction of a network (Arditi et al. 2024, arXiv 2406.11717).

Shapes: `B` prompts, `T` time, `L` layers, `P` positions, `D` width, `V` vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from temper.analysis.refusal import (
    LEAVE_OUT_LAYERS,
    MAX_KL,
    Candidate,
    Selection,
    kl_divergence,
    mean_difference,
    refusal_score,
    select_candidate,
)
from temper.models.capture import ablated, added, last_residuals, run_prompts

Prompts = Mapping[str, Tensor]  # input_ids and attention_mask, B x T, padded on the left


@dataclass(frozen=True)
class RefusalDirection:
    """Result of the search for a refusal direction.

    Args:
        selection: The chosen candidate and the reasons against the others.
        direction_D: The chosen direction, unnormalized, float64; None if no candidate passed.
        plain: Mean refusal score of the unsafe validation prompts, network as it is.
        plain_safe: That of the safe ones.
    """

    selection: Selection
    direction_D: Tensor | None
    plain: float
    plain_safe: float


def find_refusal_direction(
    network: nn.Module,
    unsafe: Prompts,
    safe: Prompts,
    refusal_ids: Sequence[int],
    n_validation: int,
    n_positions: int,
    batch_size: int,
    max_kl: float = MAX_KL,
) -> RefusalDirection:
    """Search all layers but the last fifth, and the last positions of the prompts.

    The first prompts give the candidates (differences of means), the last ``n_validation`` choose
    among them. The network does not change. A candidate takes three passes over the validation
    prompts of one kind.

    Args:
        network: A causal LM, or PEFT's wrapper around one.
        unsafe: Unsafe prompts.
        safe: Safe prompts, more than ``n_validation`` of each.
        refusal_ids: Tokens that begin a refusal.
        n_validation: Prompts of each kind to choose with.
        n_positions: Positions at the end of the prompts to look at; at most the shortest prompt.
        batch_size: Prompts in a forward pass.
        max_kl: Most KL divergence on safe prompts, in nats.
    """
    found_with = [_part(prompts, 0, -n_validation) for prompts in (unsafe, safe)]
    unsafe, safe = (_part(prompts, -n_validation, None) for prompts in (unsafe, safe))
    candidates_LPD = mean_difference(
        *(_residuals(network, prompts, n_positions, batch_size) for prompts in found_with)
    )

    def logits_BV(prompts: Prompts, change: AbstractContextManager[None] | None = None) -> Tensor:
        with change or nullcontext():
            return _logits(network, prompts, batch_size)

    def score(logits: Tensor) -> float:
        return float(refusal_score(logits, refusal_ids).mean())

    plain_safe_BV = logits_BV(safe)
    n_layers = len(candidates_LPD)
    candidates = []
    for layer, place in product(range(int(n_layers * (1 - LEAVE_OUT_LAYERS))), range(n_positions)):
        vector_D = candidates_LPD[layer, place]
        without_BV = logits_BV(safe, ablated(network, vector_D))
        candidates.append(
            Candidate(
                layer=layer,
                position=place - n_positions,
                ablated=score(logits_BV(unsafe, ablated(network, vector_D))),
                induced=score(logits_BV(safe, added(network, layer, vector_D))),
                kl=float(kl_divergence(plain_safe_BV, without_BV).mean()),
            )
        )
    selection = select_candidate(candidates, n_layers, max_kl)
    best = selection.best
    return RefusalDirection(
        selection,
        None if best is None else candidates_LPD[best.layer, best.position],
        score(logits_BV(unsafe)),
        score(plain_safe_BV),
    )


def _residuals(network: nn.Module, prompts: Prompts, n_positions: int, size: int) -> Tensor:
    """`last_residuals` of all prompts, ``B x L x P x D``."""
    return torch.cat(
        [
            last_residuals(network, batch["input_ids"], batch["attention_mask"], n_positions)
            for batch in _batches(prompts, size)
        ]
    )


def _logits(network: nn.Module, prompts: Prompts, size: int) -> Tensor:
    """`run_prompts` of all prompts, ``B x V``."""
    return torch.cat(
        [
            run_prompts(network, batch["input_ids"], batch["attention_mask"])
            for batch in _batches(prompts, size)
        ]
    )


def _part(prompts: Prompts, start: int, end: int | None) -> Prompts:
    return {name: prompts[name][start:end] for name in ("input_ids", "attention_mask")}


def _batches(prompts: Prompts, size: int) -> Iterator[Prompts]:
    for start in range(0, len(prompts["input_ids"]), size):
        yield {name: value[start : start + size] for name, value in prompts.items()}
