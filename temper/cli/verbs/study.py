"""Run a study: align, attack, evaluate and report, as one Snakemake workflow.

Everything after the study is handed to Snakemake: ``--executor slurm`` works, and files of a
study's folder, such as ``runs/demo/seed1/attack/sft/mild/p0.1/evaluation.json``, make it run those
stages and the stages before them.
"""

import argparse
import fcntl
import os
import sys
from pathlib import Path
from typing import TextIO

from rich.console import Console

from temper.errors import TemperError
from temper.run_folder import open_lock
from temper.study.cluster import slurm_words
from temper.study.progress import register
from temper.study.settings import STUDY_FILE, Study
from temper.study.stages import evaluations, report_inputs


def main(argv: list[str] | None = None) -> int:
    """Run a study, or what is left of it; 0 if all went well, 2 for a user's error."""
    parser = argparse.ArgumentParser(prog="temper study", description=__doc__, allow_abbrev=False)
    parser.add_argument("study", help="a YAML file such as studies/demo.yaml")
    parser.add_argument("--runs", default="runs", help="where run folders go (default: runs)")
    parser.add_argument(
        "--cores", default=str(os.cpu_count() or 1), help="stages at a time (default: all cores)"
    )
    options, snakemake_words = parser.parse_known_args(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)  # logs and pipes: no terminal to fit into
    try:
        study = Study.load(options.study)
        snakemake_words = [*slurm_words(snakemake_words), *snakemake_words]
        folder = Path(options.runs) / study.name
        lock = _hold(folder)
    except TemperError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(f"[bold]{study.title}[/bold]  [dim]{options.study} -> {folder}[/dim]")
    dry_run = bool({"-n", "--dry-run", "--dryrun"} & set(snakemake_words))
    status = _snakemake(
        options, snakemake_words if dry_run else [*snakemake_words, "--logger", register()]
    )
    if status == 0 and not dry_run and (folder / "report.html").exists():
        if _is_reported(study, folder):
            _show(console, study, folder)
        else:
            console.print(
                f"{folder / 'report.html'} is that of an earlier run: without naming stages, this"
                " command makes it again"
            )
    lock.close()
    return status


def _hold(folder: Path) -> TextIO:
    """Keep a second runner out of the study; the lock goes with the process, however it ends."""
    lock = open_lock(folder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise TemperError(
            f"{folder}: another process is running this study; wait for it, or give --runs another"
            " folder"
        ) from None
    return lock


def _snakemake(options: argparse.Namespace, words: list[str]) -> int:
    from snakemake.cli import main as snakemake

    arguments = [
        # first: an option with several values, such as --config, would take a named stage for one
        # of them
        *words,
        "--snakefile",
        str(Path("studies") / "Snakefile"),
        "--cores",
        options.cores,
        # Our own lock replaces Snakemake's, which a killed run would leave behind.
        "--nolock",
        "--rerun-incomplete",
        "--config",
        f"study={options.study}",
        f"runs={options.runs}",
    ]
    try:
        snakemake(arguments)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    return 0


def _is_reported(study: Study, folder: Path) -> bool:
    """Whether the report is of this study and its stages as they are now; it need not be when only
    named stages were run.
    """
    if (folder / STUDY_FILE).read_text(encoding="utf-8") != study.as_text():
        return False
    written = (folder / "report.html").stat().st_mtime_ns
    files = [*report_inputs(study, str(folder)), *evaluations(study, str(folder))]
    return all(file.exists() and file.stat().st_mtime_ns <= written for file in map(Path, files))


def _show(console: Console, study: Study, folder: Path) -> None:
    import pandas as pd

    from temper.report.findings import headline
    from temper.report.table import result_table

    results = pd.read_csv(folder / "results.csv")
    console.print(result_table(results, study))
    console.print(headline(results, study).sentence())
    console.print(f"Report: [bold]{folder / 'report.html'}[/bold]", soft_wrap=True)
