"""Print the results of a finished study as Markdown tables.

    python benchmarks/study_table.py runs/booster_refresh [--mean]

One table for the models before the attack, with their training costs, and one for each attack. A
cell is the mean over seeds, followed by the value of each seed; with --mean, by their range.
"""

import argparse
from pathlib import Path

import pandas as pd

from temper.metrics.table import SAFETY_METRICS
from temper.study import Study

SHOWN_BEFORE = ("refusal_rate", "over_refusal_rate", "safe_accuracy")
AFTER = {entry.key: entry.column for entry in SAFETY_METRICS}
BEFORE = {key: AFTER[key] for key in SHOWN_BEFORE}


def cell(values: pd.Series, mean_only: bool) -> str:
    """Mean over seeds with the value of each seed (or their range), in percent."""
    percents = [100 * value for value in values]
    seeds = ", ".join(f"{p:.0f}" for p in percents)
    if mean_only:
        seeds = f"{min(percents):.0f}–{max(percents):.0f}"
    return f"{sum(percents) / len(percents):.0f} ({seeds})"


def metric_cells(rows: pd.DataFrame, metrics: dict[str, str], mean_only: bool) -> str:
    """Cells of a table row, one per metric."""
    return " | ".join(
        cell(rows[rows["metric"] == metric].sort_values("seed")["value"], mean_only)
        for metric in metrics
    )


def header(columns: list[str]) -> str:
    """Header of a Markdown table."""
    return f"| objective | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}"


def select(frame: pd.DataFrame, stage: str, objective: str) -> pd.DataFrame:
    """Rows of a stage and an objective."""
    return frame[(frame["stage"] == stage) & (frame["objective"] == objective)]


def median_cost(frame: pd.DataFrame, name: str) -> float:
    """Median over seeds of a cost, averaged over the stages of each seed."""
    rows = frame[frame["metric"] == f"cost/{name}"]
    return float(rows.groupby("seed")["value"].mean().median()) if len(rows) else 0.0


def main(folder: Path, mean_only: bool) -> None:
    """Print the tables."""
    study = Study.of_runs(folder)
    labels = study.objectives
    results = pd.read_csv(folder / "results.csv")
    costs = pd.read_csv(folder / "costs.csv")
    alignment_costs = ["passes", "forward passes", "seconds", "peak MiB"]
    # In the user's fine-tuning and after it.
    later_costs = ["passes after", "forward passes after", "seconds after"]
    print(header([*BEFORE.values(), *alignment_costs, *later_costs]))
    for name, label in labels.items():
        aligned = select(results, "aligned", name)
        aligned_costs = select(costs, "aligned", name)
        attacked = select(results, "attacked", name)
        attacked_costs = select(costs, "attacked", name)
        cells = [
            metric_cells(aligned, BEFORE, mean_only),
            f"{median_cost(aligned, 'passes'):,.0f}",
            f"{median_cost(aligned, 'forwards'):,.0f}",
            f"{median_cost(aligned_costs, 'seconds'):.0f}",
            f"{median_cost(aligned_costs, 'peak_memory_mib'):.0f}",
            f"{median_cost(attacked, 'passes'):,.0f}",
            f"{median_cost(attacked, 'forwards'):,.0f}",
            f"{median_cost(attacked_costs, 'seconds'):.0f}",
        ]
        print(f"| {label} | {' | '.join(cells)} |")
    attacked = results[results["stage"] == "attacked"]
    settings = ["attack", "attack_lr", "harmful_ratio"]
    for (attack, lr, ratio), group in attacked.groupby(settings, sort=False):
        print(
            f"\n{study.attacks[attack]}: lr {lr:g}, p = {ratio:g}\n\n{header(list(AFTER.values()))}"
        )
        for name, label in labels.items():
            rows = group[group["objective"] == name]
            print(f"| {label} | {metric_cells(rows, AFTER, mean_only)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--mean", action="store_true", help="range over seeds instead of the value of each seed"
    )
    options = parser.parse_args()
    main(options.folder, options.mean)
