"""Losses over pairs of answers to one prompt: DPO and its relatives.

Shapes: `N` pairs. Every answer has a *score*, one number in nats, which depends on the variant
(`Preference`):

- with a reference model, ``c = l(y_c|x) - l_ref(y_c|x)`` for the chosen answer, and ``r`` likewise
  for the rejected one; without a reference model, ``l`` itself;
- per token, divided by the answer's number of tokens.

Every loss maps the two scores to one loss per pair; the loss of a step is the mean over pairs.
Prompt and padding have no labels, so they do not count in the scores.
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
    """Log-probabilities of N pairs of answers under the policy and the reference model.

    Attributes:
        chosen_N: ``l(y_c|x)``: sum of the log-probabilities of the chosen answer's tokens, nats.
        rejected_N: The same of the rejected answer.
        chosen_counts_N: Tokens of the chosen answer.
        rejected_counts_N: Tokens of the rejected answer.
        reference_chosen_N: ``l_ref(y_c|x)``; None without a reference model.
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
    """Hyperparameters of a preference loss.

    Attributes:
        beta: Scale of the scores.
        beta_rejected: Scale of the rejected answers' scores, where it is not that of the chosen
            ones (``sigmoid``); None: beta.
        label_smoothing: Assumed share of swapped labels e (``cdpo``, ``robust``).
        gamma: Margin by which beta times the score difference should exceed 0 (``simpo``).
    """

    beta: float = 0.1
    beta_rejected: float | None = None
    label_smoothing: float = 0.0
    gamma: float = 0.0

    def rewards(self, chosen_N: Tensor, rejected_N: Tensor) -> tuple[Tensor, Tensor]:
        """Scores times their beta."""
        other = self.beta if self.beta_rejected is None else self.beta_rejected
        return self.beta * chosen_N, other * rejected_N


PairLoss = Callable[[Tensor, Tensor, PairSettings], Tensor]


@dataclass(frozen=True)
class Preference:
    """A variant of the preference loss: the loss per pair, and the scores that it gets.

    Attributes:
        loss: Maps chosen_N, rejected_N and the settings to losses, ``N``.
        reference: Whether scores are relative to a reference model.
        per_token: Whether scores are divided by the answer's number of tokens.
        reads: Settings other than beta that the loss uses.
    """

    loss: PairLoss
    reference: bool = True
    per_token: bool = False
    reads: frozenset[str] = frozenset()


def sigmoid(chosen_N: Tensor, rejected_N: Tensor, settings: PairSettings) -> Tensor:
    """DPO and SimPO: ``-log sigma(b (c - r) - gamma)``, or ``-log sigma(b c - b_r r)`` with another
    beta of the rejected answers.

    DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7) on sums relative to a reference; SimPO
    (Meng et al. 2024, arXiv 2405.14734, equation 6) on means without one, with gamma; two betas as
    in the code of the mechanistic study (Jain et al. 2024, arXiv 2407.10264).
    """
    if settings.beta_rejected is None:
        return -F.logsigmoid(settings.beta * (chosen_N - rejected_N) - settings.gamma)
    chosen_N, rejected_N = settings.rewards(chosen_N, rejected_N)
    return -F.logsigmoid(chosen_N - rejected_N - settings.gamma)


def cdpo(chosen_N: Tensor, rejected_N: Tensor, settings: PairSettings) -> Tensor:
    """Conservative DPO: ``-(1 - e) log sigma(b d) - e log sigma(-b d)`` with ``d = c - r``.

    Mitchell 2023; e is the label smoothing.
    """
    agreed = sigmoid(chosen_N, rejected_N, settings)
    swapped = sigmoid(rejected_N, chosen_N, settings)
    return (1 - settings.label_smoothing) * agreed + settings.label_smoothing * swapped


def robust(chosen_N: Tensor, rejected_N: Tensor, settings: PairSettings) -> Tensor:
    """Robust DPO: ``[-(1 - e) log sigma(b d) + e log sigma(-b d)] / (1 - 2 e)``, ``d = c - r``.

    Chowdhury et al. 2024, arXiv 2403.00409; e is the label smoothing, below 1/2.
    """
    agreed = sigmoid(chosen_N, rejected_N, settings)
    swapped = sigmoid(rejected_N, chosen_N, settings)
    return ((1 - settings.label_smoothing) * agreed - settings.label_smoothing * swapped) / (
        1 - 2 * settings.label_smoothing
    )


def hinge(chosen_N: Tensor, rejected_N: Tensor, settings: PairSettings) -> Tensor:
    """Hinge loss: ``relu(1 - b (c - r))``.

    SLiC, Zhao et al. 2023, arXiv 2305.10425, on DPO's scores.
    """
    return torch.relu(1 - settings.beta * (chosen_N - rejected_N))


def ipo(chosen_N: Tensor, rejected_N: Tensor, settings: PairSettings) -> Tensor:
    """IPO: ``(c/n_c - r/n_r - 1/(2 b))^2``.

    Azar et al. 2023, arXiv 2310.12036, equation 17; per token, as the authors ran it.
    """
    return (chosen_N - rejected_N - 1 / (2 * settings.beta)) ** 2


def orpo(chosen_N: Tensor, rejected_N: Tensor, settings: PairSettings) -> Tensor:
    """ORPO: ``-lbar_c - b log sigma(log odds_c - log odds_r)``.

    Hong et al. 2024, arXiv 2403.07691, equations 4 to 7; ``odds = p / (1 - p)`` with ``log p`` the
    mean log-probability of the answer's tokens.
    """
    return -chosen_N - settings.beta * F.logsigmoid(_log_odds(chosen_N) - _log_odds(rejected_N))


def _log_odds(logps_N: Tensor) -> Tensor:
    """``log p - log(1 - p)``, with p at most the largest number below 1, for a finite gradient."""
    logps_N = logps_N.clamp(max=-torch.finfo(logps_N.dtype).eps)
    return logps_N - torch.log(-torch.expm1(logps_N))


SMOOTHED = frozenset({"label_smoothing"})
PREFERENCE: dict[Variant, Preference] = {
    "sigmoid": Preference(sigmoid, reads=frozenset({"beta_chosen", "beta_rejected"})),
    "cdpo": Preference(cdpo, reads=SMOOTHED),
    "robust": Preference(robust, reads=SMOOTHED),
    "hinge": Preference(hinge),
    "ipo": Preference(ipo, per_token=True),
    "sigmoid_norm": Preference(sigmoid, per_token=True),
    "simpo": Preference(sigmoid, reference=False, per_token=True, reads=frozenset({"gamma"})),
    "orpo": Preference(orpo, reference=False, per_token=True),
}


def pair_scores(preference: Preference, pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """Compute the scores of chosen and rejected answers that a variant's loss gets.

    Returns:
        chosen_N and rejected_N, in nats, or in nats per token for variants with ``per_token``.

    Raises:
        ValueError: the variant needs a reference model, and its log-probabilities are missing.
    """
    chosen_N = pairs.chosen_N
    rejected_N = pairs.rejected_N
    if preference.reference:
        if pairs.reference_chosen_N is None or pairs.reference_rejected_N is None:
            raise ValueError(
                "this preference loss compares with a reference model, and no reference"
                " log-probabilities are given"
            )
        chosen_N = chosen_N - pairs.reference_chosen_N
        rejected_N = rejected_N - pairs.reference_rejected_N
    if preference.per_token:
        # The sum over an answer without tokens is 0, and so is its mean.
        chosen_N = chosen_N / pairs.chosen_counts_N.clamp(min=1)
        rejected_N = rejected_N / pairs.rejected_counts_N.clamp(min=1)
    return chosen_N, rejected_N
