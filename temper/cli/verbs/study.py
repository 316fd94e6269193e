"""Run a study: align, attack, evaluate and report, as one Snakemake workflow."""

from temper.study.run import main

__all__ = ["main"]
