"""How far two judges agree."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any


def cohens_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Cohen's (1960) kappa of two raters' labels: ``(a - e) / (1 - e)``, agreement beyond what
    their own habits would give.

    ``a`` is the share of cases with the same label, ``e = sum_k p1(k) p2(k)`` what it would be if
    the raters were independent.

    Returns:
        At most 1; 0 is chance; None where it is undefined: no cases, or both gave one and the same
        label to all.

    Raises:
        ValueError: different numbers of cases.
    """
    n = len(first)
    same = sum(a == b for a, b in zip(first, second, strict=True))
    counts, others = Counter(first), Counter(second)
    by_chance = sum(
        count * others[label] for label, count in counts.items()
    )  # n^2 e, a whole number: no rounding decides
    return None if by_chance == n * n else (n * same - by_chance) / (n * n - by_chance)


def agreements(labels: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Every pair of judges: ``judges``, ``kappa`` (None: undefined), ``agreement`` (share of equal
    labels, None without cases), ``n``.

    Args:
        labels: The labels that each judge gave to the same answers, by its name.
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
