"""What a study found, as numbers that can put themselves into words."""

from dataclasses import dataclass

from temper.report import words
from temper.report.aggregate import Estimate


@dataclass(frozen=True)
class Comparison:
    """Baseline and method under one attack; mean over the harmful ratios above 0.

    Attributes:
        attack: Label of the attack.
        baseline: Strict harmful score.
        method: Strict harmful score.
        reduction: Baseline minus method; above 0 the method resists better.
        lenient_reduction: The same of the lenient score.
        baseline_accuracy: FA, if the study measures it.
        method_accuracy: FA likewise.
        accuracy_gain: Method minus baseline.
        degenerate: Degenerate rate of baseline and method.
    """

    attack: str
    baseline: Estimate
    method: Estimate
    reduction: Estimate
    lenient_reduction: Estimate | None
    baseline_accuracy: Estimate | None
    method_accuracy: Estimate | None
    accuracy_gain: Estimate | None
    degenerate: tuple[float | None, float | None]


@dataclass(frozen=True)
class Leader:
    """The lowest mean harmful score under one attack, and the next one."""

    attack: str
    objective: str
    score: Estimate
    runner_up: str | None
    runner_up_score: Estimate | None
    lead: Estimate | None


@dataclass(frozen=True)
class Worst:
    """The highest harmful score among the objectives spoken of."""

    objective: str
    attack: str
    ratio: float
    score: float


@dataclass(frozen=True)
class Before:
    """An aligned model before any attack."""

    objective: str
    refusal: Estimate | None
    safe_accuracy: Estimate | None


@dataclass(frozen=True)
class Headline:
    """What a study found.

    Attributes:
        baseline: Label; None in a study without a headline comparison.
        method: Label likewise.
        comparisons: One per attack, the headline's attack first; empty without a comparison.
        leaders: One per attack.
        before: The models spoken of, before the attack.
        worst: Where the method (without a comparison: any objective) did worst.
        n_seeds: Seeds behind every figure.
    """

    baseline: str | None
    method: str | None
    comparisons: tuple[Comparison, ...]
    leaders: tuple[Leader, ...]
    before: tuple[Before, ...]
    worst: Worst
    n_seeds: int

    def sentence(self) -> str:
        """What happened, in one plain sentence."""
        return words.sentence(self)

    def notes(self) -> list[str]:
        """What a reader must know beside the sentence."""
        return words.notes(self)
