"""Metrics of an unlearning evaluation: means over rows, two samples compared, and all of a model's.

Definitions: TOFU (Maini et al. 2024), MUSE (Shi et al. 2024, arXiv 2407.06460) and open-unlearning
(arXiv 2506.12618); the formulas are in `temper.metrics.memorisation`, the names and titles in
`temper.metrics.table`. Every metric keeps one number per row (a ``cat`` state), so batches and
ranks change only the order, and sums are exact (`math.fsum`), so the order changes nothing either.

Shapes: `B` rows, `K` answers of a row (the true one first), `T` time, `R` tokens of a generated
answer.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat

from temper.losses import IGNORE_INDEX, Scores
from temper.metrics.kolmogorov import ks_two_sample
from temper.metrics.memorisation import (
    answer_probability,
    closer_to_one,
    compared_answers,
    exact_memorisation,
    extraction_strength,
    log_truth_ratio,
    min_k_score,
    rouge_l_recall,
    truth_preferred,
    without_end,
)
from temper.metrics.safety import wilson_interval

States = list[Tensor]
MetricValues = dict[str, dict[str, Any]]  # by the metric's key: value, n, ...
AGGREGATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "closer_to_one": closer_to_one,
    "truth_preferred": truth_preferred,
}
# The sets of rows, and the aggregator of each one's truth ratio.
SETS = {"forget": "closer_to_one", "holdout": "closer_to_one", "retain": "truth_preferred"}
UTILITY = ("answer_probability", "rouge_l_recall", "truth_ratio")  # of the retain set

# -- means over rows


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
        """Keep the values of the rows that count, those with an answer; a NaN among them stays.

        Args:
            values_B: Values in [0, 1].
            counted_B: Bool.
        """
        self.values.append(values_B.detach()[counted_B])

    def compute(self) -> dict[str, float]:
        """``value`` (NaN without rows), ``ci_low``, ``ci_high`` (95 %), ``n`` rows."""
        values = joined(self.values).tolist()
        total = math.fsum(values)
        n = len(values)
        low, high = wilson_interval(min(total, float(n)), n)
        return {"value": total / n if n else math.nan, "ci_low": low, "ci_high": high, "n": n}


class AnswerProbability(RowMean):
    """Mean length-normalised probability of the answer."""

    def update(self, logps_BT: Tensor, mask_BT: Tensor) -> None:
        """Add a batch: log-probabilities of the labels (nats), and the label mask (bool)."""
        self.add(answer_probability(logps_BT, mask_BT), mask_BT.any(-1))


class ExactMemorisation(RowMean):
    """Mean share of an answer's tokens that are the likeliest ones."""

    def update(self, hits_BT: Tensor, mask_BT: Tensor) -> None:
        """Add a batch: whether each label is the likeliest token, and the label mask (bool)."""
        self.add(exact_memorisation(hits_BT, mask_BT), mask_BT.any(-1))


class ExtractionStrength(RowMean):
    """Mean share of an answer, from its end, that greedy decoding of what precedes reproduces."""

    def update(self, hits_BT: Tensor, mask_BT: Tensor) -> None:
        """Add a batch: whether each label is the likeliest token, and the label mask (bool)."""
        self.add(extraction_strength(hits_BT, mask_BT), mask_BT.any(-1))


class RougeLRecall(RowMean):
    """Mean ROUGE-L recall of generated answers, on token ids."""

    def update(self, answers: Sequence[Sequence[int]], truths: Sequence[Sequence[int]]) -> None:
        """Add a batch: generated and true answers (ids); rows with an empty truth are left out."""
        values = torch.tensor(
            [rouge_l_recall(answer, truth) for answer, truth in zip(answers, truths, strict=True)],
            device=self.device,
        )
        counted = [len(truth) > 0 for truth in truths]
        self.add(values, torch.tensor(counted, dtype=torch.bool, device=self.device))


class TruthRatio(RowMean):
    """Mean of the truth ratio R, mapped into [0, 1] so that 1 is best.

    Args:
        aggregator: ``closer_to_one``, ``min(R, 1/R)``, for rows to be forgotten;
            ``truth_preferred``, ``max(0, 1 - R)``, for rows to be kept.
    """

    higher_is_better = True

    def __init__(self, aggregator: str) -> None:
        super().__init__()
        self.aggregator = AGGREGATORS[aggregator]

    def update(
        self, logps_BKT: Tensor, mask_BKT: Tensor, paraphrased_B: Tensor | None = None
    ) -> None:
        """Add a batch: log-probabilities of true, paraphrased and perturbed answers (nats), the
        label mask (bool), and which rows have a paraphrase (see `log_truth_ratio`).
        """
        self.add(
            self.aggregator(log_truth_ratio(logps_BKT, mask_BKT, paraphrased_B)),
            has_truth_ratio(mask_BKT, paraphrased_B),
        )


def has_truth_ratio(mask_BKT: Tensor, paraphrased_B: Tensor | None = None) -> Tensor:
    """Mask (B, bool) of the rows with a right answer and at least one perturbed one."""
    right_B, wrong_BK = compared_answers(mask_BKT, paraphrased_B)
    return mask_BKT.any(-1).gather(1, right_B[:, None]).squeeze(1) & wrong_BK.any(-1)


# -- two samples


class ForgetQuality(Metric):
    """p-value of the Kolmogorov-Smirnov test between two models' truth ratios on the forget set.

    One model is the unlearned one, the other was trained without the forget set (TOFU, section
    2.2.2). Near 1, no difference can be detected. The p-value also falls with the number of rows:
    compare values of equal ``n``.
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
        """Add a batch: ``log R`` of both models (nats); the logarithm does not change the test."""
        self.unlearned.append(unlearned_B.detach())
        self.retain.append(retain_B.detach())

    def compute(self) -> dict[str, float]:
        """``value`` (p-value), ``statistic`` D, and the sample sizes ``n`` and ``n_retain``."""
        unlearned = joined(self.unlearned)
        retain = joined(self.retain)
        test = ks_two_sample(unlearned, retain)
        return {
            "value": test.p_value,
            "statistic": test.statistic,
            "n": len(unlearned),
            "n_retain": len(retain),
        }


class MembershipAUROC(Metric):
    """AUROC of the min-k % score between the forget set (members) and rows never trained on.

    0.5: they cannot be told apart; 1: all rows of the forget set look trained on; below 0.5: they
    look less likely than unseen rows, so the unlearning itself can be detected.

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
        """Add a batch of members or of others: log-probabilities (nats) and the label mask
        (bool).
        """
        scores = min_k_score(logps_BT, mask_BT, self.share).detach()[mask_BT.any(-1)]
        (self.members if member else self.others).append(scores)

    def compute(self) -> dict[str, float]:
        """``value`` in [0, 1] (NaN if a set is empty), and the sizes ``n`` and ``n_holdout``."""
        members = joined(self.members)
        others = joined(self.others)
        scores = torch.cat([members, others])
        value = math.nan
        if len(members) and len(others) and not bool(scores.isnan().any()):
            # torchmetrics applies a sigmoid to scores outside [0, 1], which makes -100 and -90
            # equal. Ranks have the same AUROC.
            ranks = torch.searchsorted(scores.sort().values, scores)  # ties share the lowest
            labels = torch.cat([torch.ones(len(members)), torch.zeros(len(others))]).long()
            value = float(binary_auroc(ranks.double() / len(scores), labels))
        return {"value": value, "n": len(members), "n_holdout": len(others)}


def privacy_leakage(auroc: float, retain_auroc: float) -> float:
    """MUSE's PrivLeak, per cent: ``100 (a - a_retain) / a_retain`` with ``a = 1 - AUROC`` (MUSE
    scores non-members).

    0 is best; below 0 the forget set is still known; above 0 its removal can be detected. NaN if
    ``a_retain`` is 0.
    """
    return 100 * (retain_auroc - auroc) / (1 - retain_auroc) if retain_auroc < 1 else math.nan


# -- all metrics of one model


class UnlearningMetrics:
    """All metrics of one model on the sets ``forget``, ``holdout`` and ``retain``.

    Metrics compute over all ranks, so every rank must compute the same ones.

    Args:
        wrong_answers: Sets whose rows have wrong (perturbed) answers.
        min_k: Share of an answer's tokens that the min-k % score averages, in (0, 1].
        end_id: Token that ends an answer.
        special_ids: Tokens that ROUGE-L ignores, as open-unlearning skips special tokens.
        device: Where the rows are.
    """

    def __init__(
        self,
        wrong_answers: Collection[str],
        min_k: float,
        end_id: int,
        special_ids: Collection[int],
        device: torch.device | str = "cpu",
    ) -> None:
        self.end_id = end_id
        self.special_ids = frozenset(special_ids)
        self.device = device
        self.metrics: dict[str, dict[str, Any]] = {name: {} for name in SETS}
        for name in wrong_answers:
            self.metrics[name]["truth_ratio"] = TruthRatio(SETS[name]).to(device)
        self.membership = MembershipAUROC(min_k).to(device)
        self.log_ratios: list[Tensor] = []

    def update(
        self,
        name: str,
        scores: Scores,
        labels_BKT: Tensor,
        answers_BR: Tensor | None = None,
        paraphrased_B: Tensor | None = None,
    ) -> None:
        """Add a batch of a set; metrics whose input is not given (logits, answers) are left out.

        An answer's end token counts for its probability and truth ratio only, as in
        open-unlearning.

        Args:
            name: The set.
            scores: ``B x K x (T - 1)``; with logits for extraction strength and exact memorisation.
            labels_BKT: `IGNORE_INDEX` where there is no label.
            answers_BR: Generated answers (ids), for ROUGE-L.
            paraphrased_B: Rows whose answer 1 is a paraphrase of the true one; None: none.
        """
        true = scores[:, 0]
        metrics = self.metrics[name]
        body_BT = without_end(true.mask)
        self._metric(name, "answer_probability", AnswerProbability).update(true.logps, true.mask)
        if "truth_ratio" in metrics:
            metrics["truth_ratio"].update(scores.logps, scores.mask, paraphrased_B)
        if true.logits is not None:
            hits_BT = true.logits.argmax(-1) == labels_BKT[:, 0, 1:]
            self._metric(name, "extraction_strength", ExtractionStrength).update(hits_BT, body_BT)
            self._metric(name, "exact_memorisation", ExactMemorisation).update(hits_BT, body_BT)
        if answers_BR is not None:
            truths = [
                self._words([token for token in row if token != IGNORE_INDEX])
                for row in labels_BKT[:, 0].tolist()
            ]
            self._metric(name, "rouge_l_recall", RougeLRecall).update(
                [self._words(row) for row in answers_BR.tolist()], truths
            )
        if name in ("forget", "holdout"):
            self.membership.update(true.logps, body_BT, member=name == "forget")
        if name == "forget":
            counted_B = has_truth_ratio(scores.mask, paraphrased_B)
            ratios_B = log_truth_ratio(scores.logps, scores.mask, paraphrased_B)
            self.log_ratios.append(ratios_B[counted_B])

    def compute(self) -> MetricValues:
        """``{"<set>/<metric>": {"value": ..., "n": ..., ...}}``, ``membership_auroc``, and
        ``model_utility``.
        """
        values: MetricValues = {
            f"{name}/{key}": metric.compute()
            for name, metrics in self.metrics.items()
            for key, metric in metrics.items()
        }
        values["membership_auroc"] = self.membership.compute()
        utility = {
            key: values[f"retain/{key}"]["value"] for key in UTILITY if f"retain/{key}" in values
        }
        values["model_utility"] = {"value": harmonic_mean(utility.values()), "of": list(utility)}
        return values

    def _metric(self, name: str, key: str, kind: type[RowMean]) -> Any:
        if key not in self.metrics[name]:
            self.metrics[name][key] = kind().to(self.device)
        return self.metrics[name][key]

    def _words(self, ids: list[int]) -> list[int]:
        """An answer up to its end, without special tokens."""
        body = ids[: ids.index(self.end_id)] if self.end_id in ids else ids
        return [token for token in body if token not in self.special_ids]


def against_retain_model(
    policy: UnlearningMetrics,
    policy_values: MetricValues,
    retain: UnlearningMetrics,
    retain_values: MetricValues,
) -> MetricValues:
    """Forget quality (where there are wrong answers) and privacy leakage: an unlearned model
    compared with one that was trained without the forget set.

    Args:
        policy: The unlearned model's metrics.
        policy_values: Their computed values.
        retain: The retain model's metrics, on the same rows.
        retain_values: Their computed values.
    """
    values: MetricValues = {}
    if "truth_ratio" in policy.metrics["forget"]:
        quality = ForgetQuality().to(policy.device)
        quality.update(torch.cat(policy.log_ratios), torch.cat(retain.log_ratios))
        values["forget_quality"] = quality.compute()
    auroc = policy_values["membership_auroc"]
    retain_auroc = retain_values["membership_auroc"]
    values["retain_model/membership_auroc"] = retain_auroc
    values["privacy_leakage"] = {"value": privacy_leakage(auroc["value"], retain_auroc["value"])}
    return values


def sets_with_wrong_answers(rows: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Names of the sets in which some row has a wrong answer."""
    return [
        name
        for name in SETS
        if bool(
            compared_answers(rows[name]["labels"] != IGNORE_INDEX, rows[name].get("paraphrased"))[
                1
            ].any()
        )
    ]


def harmonic_mean(values: Iterable[float]) -> float:
    """``n / sum(1 / v)`` of values >= 0, 0 if any is 0; TOFU's model utility, of the metrics on the
    retain set.
    """
    values = list(values)
    if any(math.isnan(value) for value in values) or not values:
        return math.nan
    return 0.0 if min(values) <= 0 else len(values) / math.fsum(1 / value for value in values)


def joined(state: States | Tensor) -> Tensor:
    """All rows of a state as float64 on the CPU; a state without any is empty."""
    return dim_zero_cat(state).cpu().double() if len(state) else torch.zeros(0, dtype=torch.float64)
