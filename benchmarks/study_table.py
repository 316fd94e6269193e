"""Print a finished study as Markdown: python benchmarks/study_table.py runs/demo [--mean].

Two kinds of tables: models before the attack, with what they cost, and after each attack. A cell is
the mean over seeds, then the single seeds in brackets; with --mean, then the lowest and highest.
"""

import argparse
from pathlib import Path

import pandas as pd

from temper.study import Study

BEFORE = {
    "refusal_rate": "refusal",
    "over_refusal_rate": "over-refusal",
    "safe_accuracy": "safe accuracy",
}
AFTER = {
    "harmful_score": "HS",
    "harmful_score_lenient": "HS lenient",
    "refusal_rate": "refusal",
    "over_refusal_rate": "over-refusal",
    "safe_accuracy": "safe accuracy",
    "fine_tune_accuracy": "FA",
    "degenerate_rate": "degenerate",
}


def cell(values: pd.Series, mean_only: bool) -> str:
    """Mean over seeds and the single values (or their range), in percent."""
    percents = [100 * value for value in values]
    rest = (
        f"{min(percents):.0f}–{max(percents):.0f}"
        if mean_only
        else ", ".join(f"{p:.0f}" for p in percents)
    )
    return f"{sum(percents) / len(percents):.0f} ({rest})"


def figures(rows: pd.DataFrame, metrics: dict[str, str], mean_only: bool) -> str:
    """Cells of a row."""
    return " | ".join(
        cell(rows[rows["metric"] == metric].sort_values("seed")["value"], mean_only)
        for metric in metrics
    )


def header(columns: list[str]) -> str:
    """The head of a Markdown table."""
    return f"| objective | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}"


def cost(frame: pd.DataFrame, name: str) -> float:
    """Median over seeds of the mean over the stages of a seed."""
    rows = frame[frame["metric"] == f"cost/{name}"]
    return float(rows.groupby("seed")["value"].mean().median()) if len(rows) else 0.0


def main(folder: Path, mean_only: bool) -> None:
    """Print the tables."""
    study = Study.of_runs(folder)
    labels = study.objectives
    results, costs = (pd.read_csv(folder / name) for name in ("results.csv", "costs.csv"))
    of = lambda frame, stage, name: frame[(frame["stage"] == stage) & (frame["objective"] == name)]  # noqa: E731
    later = [
        "passes after",
        "forward passes after",
        "seconds after",
    ]  # in the user's fine-tuning and after it
    print(header([*BEFORE.values(), "passes", "forward passes", "seconds", "peak MiB", *later]))
    for name, label in labels.items():
        aligned, measured = of(results, "aligned", name), of(costs, "aligned", name)
        spent = [
            f"{cost(aligned, 'passes'):,.0f}",
            f"{cost(aligned, 'forwards'):,.0f}",
            f"{cost(measured, 'seconds'):.0f}",
        ]
        spent += [f"{cost(measured, 'peak_memory_mib'):.0f}"]
        spent += [
            f"{cost(of(results, 'attacked', name), kind):,.0f}" for kind in ("passes", "forwards")
        ]
        spent += [f"{cost(of(costs, 'attacked', name), 'seconds'):.0f}"]
        print(f"| {label} | {figures(aligned, BEFORE, mean_only)} | {' | '.join(spent)} |")
    attacked = results[results["stage"] == "attacked"]
    for (attack, lr, ratio), group in attacked.groupby(
        ["attack", "attack_lr", "harmful_ratio"], sort=False
    ):
        print(f"\n{study.attacks[attack]}: lr {lr:g}, p = {ratio:g}\n")
        print(header(list(AFTER.values())))
        for name, label in labels.items():
            print(f"| {label} | {figures(group[group['objective'] == name], AFTER, mean_only)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--mean", action="store_true", help="range over seeds instead of single values"
    )
    options = parser.parse_args()
    main(options.folder, options.mean)
