"""Agreement of judges on the same answers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any


def cohens_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Cohen's (1960) kappa of two raters' labels: ``(a - e) / (1 - e)``, agreement beyond chance.

    ``a`` is the share of cases with the same label; ``e = sum_k p1(k) p2(k)`` is that share if the
    raters labelled independently, each with its own label frequencies.

    Returns:
        At most 1; 0 is chance; None where it is undefined: no cases, or both gave one and the same
        label to all.

    Raises:
        ValueError: different numbers of cases.
    """
    n = len(first)
    same = sum(a == b for a, b in zip(first, second, strict=True))
    counts = Counter(first)
    others = Counter(second)
    # n^2 e, a whole number: rounding cannot decide whether kappa is defined.
    by_chance = sum(count * others[label] for label, count in counts.items())
    return None if by_chance == n * n else (n * same - by_chance) / (n * n - by_chance)


def agreements(labels: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Agreement of every pair of judges.

    Args:
        labels: Labels that each judge gave to the same answers, by the judge's name.

    Returns:
        For each pair: ``judges`` (both names), ``kappa`` (None: undefined), ``agreement`` (share of
        equal labels; None without cases) and ``n`` cases.
    """
    pairs = []
    for (name, first), (other, second) in combinations(labels.items(), 2):
        n = len(first)
        agreement = sum(a == b for a, b in zip(first, second, strict=True)) / n if n else None
        pairs.append(
            {
                "judges": [name, other],
                "kappa": cohens_kappa(first, second),
                "agreement": agreement,
                "n": n,
            }
        )
    return pairs
