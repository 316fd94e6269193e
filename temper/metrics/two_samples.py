"""Two samples of an unlearning evaluation held against each other, as torchmetrics.

Shapes: `B` rows, `T` time.
"""

import math

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc

from temper.metrics.kolmogorov import ks_two_sample
from temper.metrics.memorisation import min_k_score
from temper.metrics.unlearning import States, joined


class ForgetQuality(Metric):
    """p-value of the Kolmogorov-Smirnov test between the truth ratios of two models on the rows to
    be forgotten.

    One is the unlearned model, the other was trained without those rows (TOFU, section 2.2.2). Near
    1: no difference can be seen. It falls with the number of rows too: compare figures with equal
    ``n``.
    """

    full_state_update = False
    higher_is_better = True
    unlearned: States
    retain: States

    def __init__(self) -> None:
        super().__init__()
        self.add_state("unlearned", [], dist_reduce_fx="cat")
        self.add_state("retain", [], dist_reduce_fx="cat")

    def update(self, unlearned_B: Tensor, retain_B: Tensor) -> None:
        """``log R`` of both models; the logarithm does not change the test."""
        self.unlearned.append(unlearned_B.detach())
        self.retain.append(retain_B.detach())

    def compute(self) -> dict[str, float]:
        """``value`` (p-value), ``statistic`` D, and the sample sizes ``n`` and ``n_retain``."""
        unlearned, retain = joined(self.unlearned), joined(self.retain)
        test = ks_two_sample(unlearned, retain)
        return {
            "value": test.p_value,
            "statistic": test.statistic,
            "n": len(unlearned),
            "n_retain": len(retain),
        }


class MembershipAUROC(Metric):
    """AUROC of the min-k % score between rows to be forgotten (members) and rows never trained on.

    0.5: they cannot be told apart; 1: all forgotten rows look trained on; below 0.5: they look less
    likely than unseen ones, so unlearning itself shows.

    Args:
        share: k / 100, in (0, 1].
    """

    full_state_update = False
    higher_is_better = None
    members: States
    others: States

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.add_state("members", [], dist_reduce_fx="cat")
        self.add_state("others", [], dist_reduce_fx="cat")

    def update(self, logps_BT: Tensor, mask_BT: Tensor, member: bool) -> None:
        """Log-probabilities of a batch of members, or of others (nats), and where there are
        labels.
        """
        scores = min_k_score(logps_BT, mask_BT, self.share).detach()[mask_BT.any(-1)]
        (self.members if member else self.others).append(scores)

    def compute(self) -> dict[str, float]:
        """``value`` in [0, 1] (NaN if a set is empty), and the sizes ``n`` and ``n_holdout``."""
        members, others = joined(self.members), joined(self.others)
        scores = torch.cat([members, others])
        value = math.nan
        if len(members) and len(others) and not bool(scores.isnan().any()):
            # torchmetrics puts scores outside [0, 1] through a sigmoid, which makes -100 and -90
            # one number. Ranks do not change an AUROC.
            ranks = torch.searchsorted(scores.sort().values, scores)  # ties share the lowest
            labels = torch.cat([torch.ones(len(members)), torch.zeros(len(others))]).long()
            value = float(binary_auroc(ranks.double() / len(scores), labels))
        return {"value": value, "n": len(members), "n_holdout": len(others)}


def privacy_leakage(auroc: float, retain_auroc: float) -> float:
    """MUSE's PrivLeak, per cent: ``100 (a - a_retain) / a_retain`` with ``a = 1 - AUROC`` (MUSE
    scores non-members).

    0 is best; below, forgotten rows are still known; above, they are known to have been removed.
    NaN if ``a_retain`` is 0.
    """
    return 100 * (retain_auroc - auroc) / (1 - retain_auroc) if retain_auroc < 1 else math.nan
