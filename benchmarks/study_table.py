"""Print the table of booster_refresh.md from a finished study: python benchmarks/refresh_table.py runs/booster_refresh."""

import sys
from pathlib import Path

import pandas as pd

FIGURES = {
    "harmful_score": "HS",
    "harmful_score_lenient": "HS lenient",
    "refusal_rate": "refusal",
    "safe_accuracy": "safe accuracy",
    "fine_tune_accuracy": "FA",
    "degenerate_rate": "degenerate",
}


def spread(values: pd.Series) -> str:
    """Mean over seeds and the single values, in percent."""
    percents = [100 * value for value in values]
    return f"{sum(percents) / len(percents):.0f} ({', '.join(f'{p:.0f}' for p in percents)})"


def main(folder: Path) -> None:
    """Two Markdown tables: before the attack with the cost of a step, and after each attack."""
    results, costs = (pd.read_csv(folder / name) for name in ("results.csv", "costs.csv"))
    aligned = results[results["stage"] == "aligned"]
    print("| objective | passes per step | ms per step | refusal before | safe accuracy before |")
    print("|---|---|---|---|---|")
    for objective in aligned["objective"].unique():
        rows = aligned[aligned["objective"] == objective]
        pick = lambda metric, rows=rows: rows[rows["metric"] == metric]["value"]  # noqa: E731
        seconds = costs[(costs["objective"] == objective) & (costs["stage"] == "aligned") & (costs["metric"] == "cost/seconds")]["value"]
        passes, steps = pick("cost/passes").mean() / pick("cost/steps").mean(), pick("cost/steps").mean()
        print(
            f"| {objective} | {passes:.3g} | {1000 * seconds.median() / steps:.0f} "
            f"| {spread(pick('refusal_rate'))} | {spread(pick('safe_accuracy'))} |"
        )
    attacked = results[results["stage"] == "attacked"]
    for (attack, lr, ratio), group in attacked.groupby(["attack", "attack_lr", "harmful_ratio"], sort=False):
        print(f"\n{attack}: lr {lr:g}, p = {ratio:g}\n\n| objective | {' | '.join(FIGURES.values())} |\n|---|{'---|' * len(FIGURES)}")
        for objective in aligned["objective"].unique():
            rows = group[group["objective"] == objective]
            cells = [spread(rows[rows["metric"] == metric].sort_values("seed")["value"]) for metric in FIGURES]
            print(f"| {objective} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
