"""Per-token log-probabilities, and the one definition of a mean.

Shapes: `...` any leading dimensions, `T` time, `V` vocabulary, `D` width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from temper.losses.scores import Scores

IGNORE_INDEX = -100


class MeanTerms(NamedTuple):
    """A mean kept as its numerator and denominator, so that it can be finished globally.

    The loss of a step is ``sum(total) / sum(count)`` over all micro-batches and ranks: 8 rows at
    once, 8 times 1 row and 2 ranks of 4 rows are the same loss whatever their lengths.

    Args:
        total: Scalar with gradient, nats.
        count: Scalar without gradient: unmasked tokens (or sequences, for a loss per sequence).
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count on purpose


def token_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of every label under the logits one position earlier.

    Args:
        logits: Raw scores, ``... x T x V``; position t predicts token t + 1.
        labels: Token ids, ``... x T``, `IGNORE_INDEX` where the token does not count.

    Returns:
        logps (``... x (T - 1)``, nats, 0 where masked) and mask (the same shape, bool).
    """
    targets = labels[..., 1:]
    nll = F.cross_entropy(
        exact(logits[..., :-1, :]).flatten(0, -2),
        targets.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    return -nll.view_as(targets), targets != IGNORE_INDEX


def labelled_positions(labels: Tensor) -> Tensor:
    """Places, in ``... x T`` flattened, whose logits predict a labelled token; ``N`` of them, which
    a GPU is waited for to say.
    """
    return F.pad(labels[..., 1:] != IGNORE_INDEX, (0, 1)).flatten().nonzero().squeeze(1)


def labelled_logps(logits_NV: Tensor, labels: Tensor, index_N: Tensor) -> tuple[Tensor, Tensor]:
    """`token_logps` of logits at `labelled_positions` only."""
    return _spread(
        -F.cross_entropy(exact(logits_NV), labels.flatten()[index_N + 1], reduction="none"),
        labels,
        index_N,
    )


def hidden_logps(
    hidden: Tensor, weight_VD: Tensor, labels: Tensor, bias_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`token_logps` of ``hidden @ weight.T + bias``, chunk by chunk: the logits never exist as a
    whole.

    torch's `linear_cross_entropy`. Costs a second multiplication by the output matrix and saves
    ``T x V`` floats three times over; benchmarks/fused_loss.md has figures. Masked positions are
    left out before the multiplication, which on a GPU waits for the device to say how many there
    are.

    Args:
        hidden: Final hidden states, ``... x T x D``.
        weight_VD: Output embedding.
        labels: Token ids, ``... x T``, `IGNORE_INDEX` where the token does not count.
        bias_V: Bias of the output layer.

    Returns:
        As `token_logps`.
    """
    index_N = labelled_positions(labels)
    nll = F.linear_cross_entropy(
        exact(hidden.flatten(0, -2).index_select(0, index_N)),
        exact(weight_VD),
        labels.flatten()[index_N + 1],
        linear_bias=None if bias_V is None else exact(bias_V),
        reduction="none",
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return _spread(-nll, labels, index_N)


def _spread(logps_N: Tensor, labels: Tensor, index_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``N`` labelled positions at their places, 0 elsewhere, and the mask:
    both ``... x (T - 1)``.
    """
    logps = logps_N.new_zeros(labels.numel()).index_copy(0, index_N, logps_N).view_as(labels)
    return logps[..., :-1], labels[..., 1:] != IGNORE_INDEX


def nll(scores: Scores) -> MeanTerms:
    """Negative log-likelihood per labelled token: ``-sum(mask * logps) / sum(mask)``, in nats."""
    return MeanTerms(-scores.sums.sum(), scores.counts.sum())


def kl(policy: Scores, reference: Scores) -> MeanTerms:
    """``KL(reference || policy)`` per labelled token over the whole vocabulary, in nats; needs both
    logits.
    """
    assert policy.logits is not None and reference.logits is not None
    reference_logps = exact(reference.logits).log_softmax(-1)
    divergence = (
        reference_logps.exp() * (reference_logps - exact(policy.logits).log_softmax(-1))
    ).sum(-1)
    return MeanTerms((divergence * policy.mask).sum(), policy.mask.sum())


def mean_of(values: Tensor) -> MeanTerms:
    """Mean over rows of a loss per row."""
    return MeanTerms(values.sum(), values.new_full((), values.numel()))


def exact(values: Tensor) -> Tensor:
    """At least float32: a log-softmax in bf16 has three digits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
