"""Flags of Snakemake for jobs that go to SLURM."""

import itertools
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import yaml

from temper.errors import TemperError
from temper.packages import install_hint

PLUGIN = "snakemake_executor_plugin_slurm"


def slurm_words(words: Sequence[str]) -> list[str]:
    """Words for Snakemake that follow from its others: none unless they choose SLURM.

    Without accounting ``sacct`` knows no job, although it is installed, and a study would wait
    forever: ``squeue`` is asked.

    Raises:
        TemperError: SLURM is chosen, and Snakemake's executor for it is not installed.
    """
    if _executor(words) != "slurm":
        return []
    if find_spec(PLUGIN) is None:
        raise TemperError(f"executor slurm: {install_hint(PLUGIN)}")
    if _given(words, "--slurm-status-command") or _accounting():
        return []
    return ["--slurm-status-command", "squeue"]


def _executor(words: Sequence[str]) -> str | None:
    """The executor that the words choose, themselves or through a profile."""
    if (named := _given(words, "--executor", "-e")) is not None:
        return named
    profile = _given(words, "--profile", "--workflow-profile")
    if profile is None:
        return None
    for file in sorted(Path(profile).glob("config*.yaml")):
        settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        return str(settings["executor"]) if "executor" in settings else None
    return None


def _given(words: Sequence[str], *flags: str) -> str | None:
    """The value of a flag, written as one word or as two."""
    for word, after in itertools.zip_longest(words, words[1:], fillvalue=""):
        for flag in flags:
            if word == flag:
                return after
            if word.startswith(f"{flag}="):
                return word.partition("=")[2]
    return None


def _accounting() -> bool:
    """Whether SLURM keeps accounts; True where it cannot be asked."""
    try:
        shown = subprocess.run(
            ("scontrol", "show", "config"), capture_output=True, text=True, timeout=30
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return True
    types = [
        line.split("=")[1].strip()
        for line in shown.splitlines()
        if line.startswith("AccountingStorageType")
    ]
    return types not in (["accounting_storage/none"], ["(null)"])
