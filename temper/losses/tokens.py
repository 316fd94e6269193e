"""Per-token log-probabilities, NLL and KL, and the one definition of a mean loss.

Shapes: `...` any leading dimensions, `T` time, `V` vocabulary, `D` width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from temper.losses.scores import Scores

IGNORE_INDEX = -100


class MeanTerms(NamedTuple):
    """Numerator and denominator of a mean, which are summed over ranks before the division.

    The loss of a step is ``sum(total) / sum(count)`` over all micro-batches and ranks: 8 rows at
    once, 8 times 1 row and 2 ranks of 4 rows give the same loss, whatever their lengths.

    Args:
        total: Scalar with gradient, nats.
        count: Scalar without gradient: unmasked tokens (or sequences, for a loss per sequence).
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count on purpose


def token_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of every label from the logits one position earlier.

    Args:
        logits: Raw scores, ``... x T x V``; position t predicts token t + 1.
        labels: Token ids, ``... x T``, `IGNORE_INDEX` where the token does not count.

    Returns:
        logps (``... x (T - 1)``, nats, 0 where masked) and mask (the same shape, bool).
    """
    targets = labels[..., 1:]
    nll = F.cross_entropy(
        upcast(logits[..., :-1, :]).flatten(0, -2),
        targets.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    return -nll.view_as(targets), targets != IGNORE_INDEX


def labelled_positions(labels: Tensor) -> Tensor:
    """Return the positions whose logits predict a labelled token.

    On a GPU this waits for the device, as `torch.nonzero` does.

    Returns:
        Indices into the flattened ``... x T``, ``N``.
    """
    return F.pad(labels[..., 1:] != IGNORE_INDEX, (0, 1)).flatten().nonzero().squeeze(1)


def labelled_logps(logits_NV: Tensor, labels: Tensor, index_N: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `token_logps` from logits at `labelled_positions` only.

    Args:
        logits_NV: Logits at those positions.
        labels: Token ids, ``... x T``, `IGNORE_INDEX` where the token does not count.
        index_N: `labelled_positions` of the labels.

    Returns:
        As `token_logps`.
    """
    return _scatter(
        -F.cross_entropy(upcast(logits_NV), labels.flatten()[index_N + 1], reduction="none"),
        labels,
        index_N,
    )


def hidden_logps(
    hidden: Tensor, weight_VD: Tensor, labels: Tensor, bias_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `token_logps` of ``hidden @ weight.T + bias`` in chunks, without all logits at once.

    This is torch's `linear_cross_entropy`. It costs a second multiplication by the output matrix
    and saves three times ``T x V`` floats; see benchmarks/fused_loss.md for measurements. Masked
    positions are left out before the multiplication; on a GPU that waits for the device
    (`labelled_positions`).

    Args:
        hidden: Final hidden states, ``... x T x D``.
        weight_VD: Weight of the output layer.
        labels: Token ids, ``... x T``, `IGNORE_INDEX` where the token does not count.
        bias_V: Bias of the output layer.

    Returns:
        As `token_logps`.
    """
    index_N = labelled_positions(labels)
    nll = F.linear_cross_entropy(
        upcast(hidden.flatten(0, -2).index_select(0, index_N)),
        upcast(weight_VD),
        labels.flatten()[index_N + 1],
        linear_bias=None if bias_V is None else upcast(bias_V),
        reduction="none",
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return _scatter(-nll, labels, index_N)


def _scatter(logps_N: Tensor, labels: Tensor, index_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``N`` positions as ``... x (T - 1)``, 0 elsewhere, and their mask."""
    logps = logps_N.new_zeros(labels.numel()).index_copy(0, index_N, logps_N).view_as(labels)
    return logps[..., :-1], labels[..., 1:] != IGNORE_INDEX


def nll(scores: Scores) -> MeanTerms:
    """Negative log-likelihood per labelled token: ``-sum(mask * logps) / sum(mask)``, in nats."""
    return MeanTerms(-scores.sums.sum(), scores.counts.sum())


def kl(policy: Scores, reference: Scores, prompts: bool = False) -> MeanTerms:
    """``KL(reference || policy)`` over the whole vocabulary, in nats: mean over the positions that
    predict a labelled token.

    Args:
        policy: Scores with logits.
        reference: Scores with logits of the same rows.
        prompts: Over all positions that predict a token, those of prompts included.
    """
    assert policy.logits is not None and reference.logits is not None
    mask = policy.mask
    if prompts:
        assert policy.attended is not None
        mask = policy.attended[..., 1:] & policy.attended[..., :-1]
    reference_logps = upcast(reference.logits).log_softmax(-1)
    divergence = (
        reference_logps.exp() * (reference_logps - upcast(policy.logits).log_softmax(-1))
    ).sum(-1)
    return MeanTerms((divergence * mask).sum(), mask.sum())


def mean_of(values: Tensor) -> MeanTerms:
    """Return the terms of the mean over rows of a loss per row."""
    return MeanTerms(values.sum(), values.new_full((), values.numel()))


def upcast(values: Tensor) -> Tensor:
    """Cast to at least float32: a log-softmax in bfloat16 is exact to three digits only."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
