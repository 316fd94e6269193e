"""Snakemake's events as one line per stage: a Snakemake logger plugin, registered as ``temper``.

Lines of stages that were judged have their metrics.
"""

import json
import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.registry import LoggerPluginRegistry

from temper.run_folder import EVALUATION, JUDGED

SHOWN = {
    "harmful_score": "HS",
    "refusal_rate": "refusal",
    "safe_accuracy": "safe",
    "fine_tune_accuracy": "FA",
}
TAIL = 15  # lines of a failed stage's log
RESTARTED = re.compile(r"Trying to restart job (\d+)")  # Snakemake has no event for it


class LogHandler(LogHandlerBase):
    """Prints ``stage, seconds`` when a stage is done, its metrics when it was judged, and the end
    of its log if it failed; and how often it was tried.
    """

    writes_to_stream = True
    writes_to_file = False
    has_filter = True  # takes every event, whatever --quiet says
    has_formatter = True
    needs_rulegraph = False

    def __post_init__(self) -> None:
        self.console = Console()
        self._jobs: dict[int, dict[str, Any]] = {}
        self._failures: Counter[int] = Counter()
        self._done = self._total = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Take one event of Snakemake's."""
        event = getattr(record, "event", None)
        name = str(getattr(event, "value", event))
        if name == "run_info":
            stats = record.__dict__["stats"]
            self._total = int(stats["total"]) - int(stats.get("all", 0))  # `all` is not a stage
        elif name == "job_info":
            self._jobs[record.__dict__["jobid"]] = record.__dict__ | {
                "started": time.perf_counter()
            }
        elif name == "job_finished":
            self._finished(self._jobs.get(record.__dict__["job_id"]))
        elif name == "job_error":
            self._failed(
                self._jobs.get(record.__dict__["jobid"]), record.__dict__.get("rule_msg") or ""
            )
        elif again := RESTARTED.search(record.getMessage()):
            self._restarted(int(again[1]))
        elif record.levelno >= logging.ERROR:
            self.console.print(record.getMessage(), style="red", highlight=False, markup=False)

    def _finished(self, job: dict[str, Any] | None) -> None:
        if job is None or job["rule_name"] == "all":
            return
        self._done += 1
        seconds = time.perf_counter() - job["started"]
        line = (
            f"[green]done[/green] {self._done:>3}/{self._total} "
            f" {self._title(job):<34}{seconds:>6.0f} s"
        )
        if failures := self._failures[job["jobid"]]:
            line += f"   attempt {failures + 1}"
        self.console.print(line, highlight=False, soft_wrap=True)
        for stage, metrics in self._judged(job):
            self.console.print(
                f"              {stage:<34}   [dim]{metrics}[/dim]", highlight=False, soft_wrap=True
            )

    def _failed(self, job: dict[str, Any] | None, reason: str) -> None:
        if job is None:
            return
        self._failures[job["jobid"]] += 1
        log = Path(str(next(iter(job["log"]), "")))
        title = (
            f"[red]failed[/red]  {self._title(job)}, attempt {self._failures[job['jobid']]}; its"
            f" log is {log}"
        )
        self.console.print(title, highlight=False, soft_wrap=True)
        if reason:  # of a scheduler: out of time or memory, cancelled
            self.console.print(
                f"  {reason.splitlines()[0].partition('For further error details')[0]}",
                highlight=False,
                markup=False,
            )
        if log.is_file():
            for line in log.read_text(errors="replace").splitlines()[-TAIL:]:
                self.console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)

    def _restarted(self, jobid: int) -> None:
        if job := self._jobs.get(jobid):
            self.console.print(
                f"[yellow]again[/yellow]   {self._title(job)}, attempt {self._failures[jobid] + 1}",
                highlight=False,
            )

    def _title(self, job: dict[str, Any]) -> str:
        wildcards = dict(job["wildcards"] or {})
        seed = wildcards.pop("seed", None)
        ratio = wildcards.pop("ratio", None)
        words = [job["rule_name"], *wildcards.values()]
        words += [f"p={ratio}"] if ratio else []
        words += [f"seed {seed}"] if seed is not None else []
        return " ".join(words)

    def _judged(self, job: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """Folder and metrics of the stages that a job has judged."""
        for output in map(Path, map(str, job["output"] or ())):
            if output.name == EVALUATION:
                yield output.parent.name, _metrics(output)
            elif output.name == JUDGED:
                for folder in map(Path, json.loads(output.read_text())["stages"]):
                    inside = folder.is_relative_to(output.parent)
                    name = folder.relative_to(output.parent) if inside else folder.name
                    yield str(name), _metrics(folder / EVALUATION)


def _metrics(evaluation: Path) -> str:
    metrics = json.loads(evaluation.read_text())["metrics"]
    return "  ".join(
        f"{title} {100 * metrics[name]['value']:.0f}%"
        for name, title in SHOWN.items()
        if name in metrics
    )


def register() -> str:
    """Make the plugin known to Snakemake in this process; returns its name for ``--logger``."""
    LoggerPluginRegistry().register_plugin("temper", sys.modules[__name__])
    return "temper"
