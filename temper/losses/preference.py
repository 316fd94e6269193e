"""Losses over pairs of answers to one prompt: DPO and its relatives.

Shapes: `N` pairs. A pair's *score* is one number per answer, in nats; what it is depends on the
variant (`Preference`):

- with a reference: ``c = l(y_c|x) - l_ref(y_c|x)`` and ``r`` likewise, without one ``l`` itself;
- per token: divided by the answer's own number of tokens.

Every loss sees the two scores and returns one loss per pair; the loss of a step is their mean over
pairs. Prompt and padding have no label, so they are in no score.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Variant = Literal["sigmoid", "cdpo", "robust", "hinge", "ipo", "sigmoid_norm", "simpo", "orpo"]


@dataclass(frozen=True)
class PairLogps:
    """What policy and reference say about N pairs.

    Attributes:
        chosen_N: ``l(y_c|x)``: sum of the log-probabilities of the chosen answer's tokens, nats.
        rejected_N: The same of the rejected answer.
        chosen_counts_N: Tokens of the chosen answer.
        rejected_counts_N: Tokens of the rejected answer.
        reference_chosen_N: ``l_ref(y_c|x)``; None where there is no reference.
        reference_rejected_N: ``l_ref(y_r|x)``.
    """

    chosen_N: Tensor
    rejected_N: Tensor
    chosen_counts_N: Tensor
    rejected_counts_N: Tensor
    reference_chosen_N: Tensor | None = None
    reference_rejected_N: Tensor | None = None


@dataclass(frozen=True)
class PairSettings:
    """Numbers of a loss.

    Attributes:
        beta: Scale of the scores; a tensor ``N`` gives every pair its own.
        label_smoothing: Assumed share of swapped labels e (``cdpo``, ``robust``).
        gamma: Margin that the scores must differ by, after beta (``simpo``).
    """

    beta: float | Tensor = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.0


PairLoss = Callable[[Tensor, Tensor, PairSettings], Tensor]


@dataclass(frozen=True)
class Preference:
    """A variant: its loss per pair, and which scores the loss is of.

    Attributes:
        loss: Maps chosen_N, rejected_N and the settings to losses_N.
        reference: Scores are relative to a reference model.
        per_token: Scores are divided by the number of the answer's tokens.
        reads: Settings beyond beta that the loss reads.
    """

    loss: PairLoss
    reference: bool = True
    per_token: bool = False
    reads: frozenset[str] = frozenset()


def sigmoid(chosen_N: Tensor, rejected_N: Tensor, settings: PairSettings) -> Tensor:
    """``-log sigma(b (c - r) - gamma)``.

    DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7) on sums relative to a reference; SimPO
    (Meng et al. 2024, arXiv 2405.14734, equation 6) on means without one, with gamma.
    """
    return -F.logsigmoid(settings.beta * (chosen_N - rejected_N) - settings.gamma)


def cdpo(chosen_N: Tensor, rejected_N: Tensor, settings: PairSettings) -> Tensor:
    """``-(1 - e) log sigma(b d) - e log sigma(-b d)`` (conservative DPO, Mitchell 2023),
    ``d = c - r``.
    """
    agreed, swapped = (
        sigmoid(chosen_N, rejected_N, settings),
        sigmoid(rejected_N, chosen_N, settings),
    )
    return (1 - settings.label_smoothing) * agreed + settings.label_smoothing * swapped


def robust(chosen_N: Tensor, rejected_N: Tensor, settings: PairSettings) -> Tensor:
    """``[-(1 - e) log sigma(b d) + e log sigma(-b d)] / (1 - 2 e)`` (Chowdhury et al. 2024, arXiv
    2403.00409); e < 1/2.
    """
    agreed, swapped = (
        sigmoid(chosen_N, rejected_N, settings),
        sigmoid(rejected_N, chosen_N, settings),
    )
    return ((1 - settings.label_smoothing) * agreed - settings.label_smoothing * swapped) / (
        1 - 2 * settings.label_smoothing
    )


def hinge(chosen_N: Tensor, rejected_N: Tensor, settings: PairSettings) -> Tensor:
    """``relu(1 - b d)`` (SLiC, Zhao et al. 2023, arXiv 2305.10425, on DPO's scores)."""
    return torch.relu(1 - settings.beta * (chosen_N - rejected_N))


def ipo(chosen_N: Tensor, rejected_N: Tensor, settings: PairSettings) -> Tensor:
    """``(c/n_c - r/n_r - 1/(2 b))^2`` (Azar et al. 2023, arXiv 2310.12036, equation 17; per token,
    as its authors ran it).
    """
    return (chosen_N - rejected_N - 1 / (2 * settings.beta)) ** 2


def orpo(chosen_N: Tensor, rejected_N: Tensor, settings: PairSettings) -> Tensor:
    """``-lbar_c - b log sigma(log odds_c - log odds_r)`` (Hong et al. 2024, arXiv 2403.07691,
    equations 4 to 7).

    ``odds = p / (1 - p)`` with ``log p`` the mean log-probability of the answer's tokens.
    """
    return -chosen_N - settings.beta * F.logsigmoid(_log_odds(chosen_N) - _log_odds(rejected_N))


def _log_odds(logps_N: Tensor) -> Tensor:
    """``log p - log(1 - p)``; a p that rounds to 1 counts as the largest that does not, for a
    finite gradient.
    """
    logps_N = logps_N.clamp(max=-torch.finfo(logps_N.dtype).eps)
    return logps_N - torch.log(-torch.expm1(logps_N))


SMOOTHED = frozenset({"label_smoothing"})
PREFERENCE: dict[Variant, Preference] = {
    "sigmoid": Preference(sigmoid),
    "cdpo": Preference(cdpo, reads=SMOOTHED),
    "robust": Preference(robust, reads=SMOOTHED),
    "hinge": Preference(hinge),
    "ipo": Preference(ipo, per_token=True),
    "sigmoid_norm": Preference(sigmoid, per_token=True),
    "simpo": Preference(sigmoid, reference=False, per_token=True, reads=frozenset({"gamma"})),
    "orpo": Preference(orpo, reference=False, per_token=True),
}


def pair_scores(preference: Preference, pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """chosen_N and rejected_N as a variant's loss sees them, in nats (per token, for those per
    token).

    Raises:
        ValueError: the variant compares with a reference, and there is none.
    """
    chosen_N, rejected_N = pairs.chosen_N, pairs.rejected_N
    if preference.reference:
        if pairs.reference_chosen_N is None or pairs.reference_rejected_N is None:
            raise ValueError(
                "this preference loss compares with a reference model, and no reference"
                " log-probabilities are given"
            )
        chosen_N, rejected_N = (
            chosen_N - pairs.reference_chosen_N,
            rejected_N - pairs.reference_rejected_N,
        )
    if preference.per_token:
        # An answer of no tokens has the sum 0, and the mean 0.
        chosen_N, rejected_N = (
            chosen_N / pairs.chosen_counts_N.clamp(min=1),
            rejected_N / pairs.rejected_counts_N.clamp(min=1),
        )
    return chosen_N, rejected_N
