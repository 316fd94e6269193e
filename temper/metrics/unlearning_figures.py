"""All figures of one model on the sets of an unlearning evaluation, batch by batch.

Shapes: `B` rows, `K` answers of a row (the true one first), `T` time, `R` tokens of a written
answer.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from temper.losses import IGNORE_INDEX, Scores
from temper.metrics.memorisation import log_truth_ratio, without_end
from temper.metrics.two_samples import ForgetQuality, MembershipAUROC, privacy_leakage
from temper.metrics.unlearning import (
    AnswerProbability,
    ExactMemorisation,
    ExtractionStrength,
    RougeLRecall,
    RowMean,
    TruthRatio,
    harmonic_mean,
    has_truth_ratio,
)

# The sets, and how a truth ratio on each is brought into [0, 1].
SETS = {"forget": "closer_to_one", "holdout": "closer_to_one", "retain": "truth_preferred"}
UTILITY = ("answer_probability", "rouge_l_recall", "truth_ratio")  # of the retain set
Figures = dict[str, dict[str, Any]]


class UnlearningFigures:
    """Metrics of one model. They finish over all ranks, so every rank must compute the same ones.

    Args:
        wrong_answers: Sets whose rows have wrong answers.
        min_k: Share of an answer's tokens that min-k % looks at.
        end_id: Token that ends an answer.
        special_ids: Tokens that ROUGE-L does not look at, as open-unlearning skips special tokens.
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
        self.end_id, self.special_ids, self.device = end_id, frozenset(special_ids), device
        self.metrics: dict[str, dict[str, Any]] = {name: {} for name in SETS}
        for name in wrong_answers:
            self.metrics[name]["truth_ratio"] = TruthRatio(SETS[name]).to(device)
        self.membership = MembershipAUROC(min_k).to(device)
        self.log_ratios: list[Tensor] = []

    def update(
        self, name: str, scores: Scores, labels_BKT: Tensor, answers_BR: Tensor | None = None
    ) -> None:
        """Count a batch of a set; figures whose input is not given (logits, written answers) are
        left out.

        An answer's end token counts for its probability and truth ratio only, as in
        open-unlearning.
        """
        true, metrics = scores[:, 0], self.metrics[name]
        body_BT = without_end(true.mask)
        self._metric(name, "answer_probability", AnswerProbability).update(true.logps, true.mask)
        if "truth_ratio" in metrics:
            metrics["truth_ratio"].update(scores.logps, scores.mask)
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
            self.log_ratios.append(
                log_truth_ratio(scores.logps, scores.mask)[has_truth_ratio(scores.mask)]
            )

    def compute(self) -> Figures:
        """``{"<set>/<figure>": {"value": ..., "n": ..., ...}}``, ``membership_auroc``, and
        ``model_utility``.
        """
        figures: Figures = {
            f"{name}/{key}": metric.compute()
            for name, metrics in self.metrics.items()
            for key, metric in metrics.items()
        }
        figures["membership_auroc"] = self.membership.compute()
        parts = {
            part: figures[f"retain/{part}"]["value"]
            for part in UTILITY
            if f"retain/{part}" in figures
        }
        figures["model_utility"] = {"value": harmonic_mean(parts.values()), "of": list(parts)}
        return figures

    def _metric(self, name: str, key: str, kind: type[RowMean]) -> Any:
        if key not in self.metrics[name]:
            self.metrics[name][key] = kind().to(self.device)
        return self.metrics[name][key]

    def _words(self, ids: list[int]) -> list[int]:
        """An answer up to its end, without special tokens."""
        body = ids[: ids.index(self.end_id)] if self.end_id in ids else ids
        return [token for token in body if token not in self.special_ids]


def against_retain_model(
    policy: UnlearningFigures, figures: Figures, retain: UnlearningFigures, retain_figures: Figures
) -> Figures:
    """Forget quality (where there are wrong answers) and privacy leakage of a model beside one that
    never saw the forget set.

    Args:
        policy: The unlearned model's metrics.
        figures: What they computed.
        retain: The retain model's metrics, on the same rows.
        retain_figures: What they computed.
    """
    found: Figures = {}
    if "truth_ratio" in policy.metrics["forget"]:
        quality = ForgetQuality().to(policy.device)
        quality.update(torch.cat(policy.log_ratios), torch.cat(retain.log_ratios))
        found["forget_quality"] = quality.compute()
    auroc, retain_auroc = figures["membership_auroc"], retain_figures["membership_auroc"]
    found["retain_model/membership_auroc"] = retain_auroc
    found["privacy_leakage"] = {"value": privacy_leakage(auroc["value"], retain_auroc["value"])}
    return found


def sets_with_wrong_answers(rows: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Sets in which a row has a labelled sequence beside the true answer."""
    return [name for name in SETS if bool((rows[name]["labels"][:, 1:] != IGNORE_INDEX).any())]
