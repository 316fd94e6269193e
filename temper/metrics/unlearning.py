"""Means over rows of an unlearning evaluation, as torchmetrics.

Definitions: TOFU (Maini et al. 2024), MUSE (Shi et al. 2024, arXiv 2407.06460) and open-unlearning
(arXiv 2506.12618); the formulas are in `temper.metrics.memorisation`. Every metric keeps one number
per row (a ``cat`` state), so batches and ranks change nothing but the order, and sums are exact
(`math.fsum`), so the order changes nothing either.

Shapes: `B` rows, `K` answers of a row (the true one first), `T` time.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from temper.metrics.memorisation import (
    answer_probability,
    closer_to_one,
    exact_memorisation,
    extraction_strength,
    log_truth_ratio,
    rouge_l_recall,
    truth_preferred,
)
from temper.metrics.safety import wilson_interval

States = list[Tensor]


class RowMean(Metric):
    """Mean over rows of a value in [0, 1].

    The interval is Wilson's with the mean in place of the share: a value in [0, 1] with mean p has
    a variance of at most ``p (1 - p)``, that of a share, so the interval is wide enough whatever
    the values are.
    """

    full_state_update = False
    higher_is_better: bool | None = None
    values: States

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", [], dist_reduce_fx="cat")

    def add(self, values_B: Tensor, counted_B: Tensor) -> None:
        """Keep the rows that count: those with an answer. A NaN among them stays, and shows."""
        self.values.append(values_B.detach()[counted_B])

    def compute(self) -> dict[str, float]:
        """``value`` (NaN without rows), ``ci_low``, ``ci_high`` (95 %), ``n`` rows."""
        values = joined(self.values).tolist()
        total, n = math.fsum(values), len(values)
        low, high = wilson_interval(min(total, float(n)), n)
        return {"value": total / n if n else math.nan, "ci_low": low, "ci_high": high, "n": n}


class AnswerProbability(RowMean):
    """Mean length-normalised probability of the answer."""

    def update(self, logps_BT: Tensor, mask_BT: Tensor) -> None:
        """Log-probabilities of the labels (nats), and where there are labels."""
        self.add(answer_probability(logps_BT, mask_BT), mask_BT.any(-1))


class ExactMemorisation(RowMean):
    """Mean share of an answer's tokens that are the likeliest ones."""

    def update(self, hits_BT: Tensor, mask_BT: Tensor) -> None:
        """Whether each label is the likeliest token, and where there are labels."""
        self.add(exact_memorisation(hits_BT, mask_BT), mask_BT.any(-1))


class ExtractionStrength(RowMean):
    """Mean share of an answer that follows greedily from what is in front of it."""

    def update(self, hits_BT: Tensor, mask_BT: Tensor) -> None:
        """Whether each label is the likeliest token, and where there are labels."""
        self.add(extraction_strength(hits_BT, mask_BT), mask_BT.any(-1))


class RougeLRecall(RowMean):
    """Mean ROUGE-L recall of free-running answers, on token ids."""

    def update(self, answers: Sequence[Sequence[int]], truths: Sequence[Sequence[int]]) -> None:
        """What was written, and what should be; rows whose truth is empty are left out."""
        values = torch.tensor(
            [rouge_l_recall(answer, truth) for answer, truth in zip(answers, truths, strict=True)],
            device=self.device,
        )
        self.add(
            values,
            torch.tensor(
                [len(truth) > 0 for truth in truths], dtype=torch.bool, device=self.device
            ),
        )


AGGREGATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "closer_to_one": closer_to_one,
    "truth_preferred": truth_preferred,
}


class TruthRatio(RowMean):
    """Mean of the truth ratio R, brought into [0, 1] so that 1 is best.

    Args:
        aggregator: ``closer_to_one``, ``min(R, 1/R)``, for rows to be forgotten;
            ``truth_preferred``, ``max(0, 1 - R)``, for rows to be kept.
    """

    higher_is_better = True

    def __init__(self, aggregator: str) -> None:
        super().__init__()
        self.aggregator = AGGREGATORS[aggregator]

    def update(self, logps_BKT: Tensor, mask_BKT: Tensor) -> None:
        """Log-probabilities of the true and the perturbed answers (nats), and where there are
        labels.
        """
        self.add(self.aggregator(log_truth_ratio(logps_BKT, mask_BKT)), has_truth_ratio(mask_BKT))


def has_truth_ratio(mask_BKT: Tensor) -> Tensor:
    """Rows with a true answer and at least one perturbed one."""
    given_BK = mask_BKT.any(-1)
    return given_BK[:, 0] & given_BK[:, 1:].any(-1)


def harmonic_mean(values: Iterable[float]) -> float:
    """``n / sum(1 / v)`` of values >= 0: 0 if any is 0. TOFU's model utility, of the figures on
    what is to be kept.
    """
    values = list(values)
    if any(math.isnan(value) for value in values) or not values:
        return math.nan
    return 0.0 if min(values) <= 0 else len(values) / math.fsum(1 / value for value in values)


def joined(state: States | Tensor) -> Tensor:
    """All of a state as float64 on the CPU; a state that was never written is empty."""
    return dim_zero_cat(state).cpu().double() if len(state) else torch.zeros(0, dtype=torch.float64)
