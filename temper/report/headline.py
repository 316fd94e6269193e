"""The comparison a study was made for, worked out from its results."""

from typing import Any

import pandas as pd

from temper.errors import TemperError
from temper.report.aggregate import Shares, difference, interval, shares
from temper.report.findings import Before, Comparison, Headline, Leader, Worst
from temper.report.settings import Settings, read_settings


def headline(results: pd.DataFrame, study: dict[str, Any]) -> Headline:
    """Compare baseline and method, or name the lowest harmful score where a study names neither.

    Args:
        results: The tidy table (``results.csv``).
        study: The study's YAML.

    Raises:
        TemperError: The study's headline names what the study does not have.
    """
    settings = read_settings(study)
    contest = settings.contest
    leaders = tuple(_leader(results, settings, attack) for attack in settings.attacks)
    if contest is None:
        spoken = list(settings.objectives)
        comparisons: tuple[Comparison, ...] = ()
    else:
        spoken = [contest.baseline, contest.method]
        attacks = sorted(settings.attacks, key=lambda attack: attack != contest.attack)  # stable: the headline's first
        comparisons = tuple(_compare(results, settings, attack, *spoken) for attack in attacks)
    return Headline(
        baseline=settings.objectives[contest.baseline] if contest else None,
        method=settings.objectives[contest.method] if contest else None,
        comparisons=comparisons,
        leaders=leaders,
        before=tuple(_before(results, settings, objective) for objective in spoken),
        worst=_worst(results, settings, [contest.method] if contest else spoken),
        n_seeds=len(settings.seeds),
    )


def _compare(results: pd.DataFrame, settings: Settings, attack: str, baseline: str, method: str) -> Comparison:
    def of(metric: str, objective: str) -> Shares | None:
        return shares(results, metric, objective, attack, settings.counted_ratios)

    score_b, score_m = (_needed(of("harmful_score", objective)) for objective in (baseline, method))
    lenient_b, lenient_m = (of("harmful_score_lenient", objective) for objective in (baseline, method))
    accuracy_b, accuracy_m = (of("fine_tune_accuracy", objective) for objective in (baseline, method))
    broken = [of("degenerate_rate", objective) for objective in (baseline, method)]
    return Comparison(
        attack=settings.attacks[attack],
        baseline=interval(score_b),
        method=interval(score_m),
        reduction=difference(score_b, score_m),
        lenient_reduction=difference(lenient_b, lenient_m) if lenient_b and lenient_m else None,
        baseline_accuracy=interval(accuracy_b) if accuracy_b else None,
        method_accuracy=interval(accuracy_m) if accuracy_m else None,
        accuracy_gain=difference(accuracy_m, accuracy_b) if accuracy_b and accuracy_m else None,
        degenerate=(broken[0].mean if broken[0] else None, broken[1].mean if broken[1] else None),
    )


def _leader(results: pd.DataFrame, settings: Settings, attack: str) -> Leader:
    scores = {o: _needed(shares(results, "harmful_score", o, attack, settings.counted_ratios)) for o in settings.objectives}
    first, *rest = sorted(scores, key=lambda objective: scores[objective].mean)
    second = rest[0] if rest else None
    return Leader(
        attack=settings.attacks[attack],
        objective=settings.objectives[first],
        score=interval(scores[first]),
        runner_up=settings.objectives[second] if second else None,
        runner_up_score=interval(scores[second]) if second else None,
        lead=difference(scores[second], scores[first]) if second else None,
    )


def _worst(results: pd.DataFrame, settings: Settings, objectives: list[str]) -> Worst:
    cells = [
        Worst(label, settings.attacks[attack], ratio, _needed(shares(results, "harmful_score", objective, attack, [ratio])).mean)
        for objective, label in settings.objectives.items()
        if objective in objectives
        for attack in settings.attacks
        for ratio in settings.ratios
    ]
    return max(cells, key=lambda cell: cell.score)


def _before(results: pd.DataFrame, settings: Settings, objective: str) -> Before:
    refusal, accuracy = (shares(results, metric, objective) for metric in ("refusal_rate", "safe_accuracy"))
    return Before(settings.objectives[objective], interval(refusal) if refusal else None, interval(accuracy) if accuracy else None)


def _needed(measured: Shares | None) -> Shares:
    if measured is None:
        raise TemperError("results.csv: an attacked stage has no harmful_score; validate it with the SafetyEvaluation callback")
    return measured
