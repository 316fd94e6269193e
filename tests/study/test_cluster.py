"""What a study on SLURM needs besides the user's words."""

import subprocess
from types import SimpleNamespace

import pytest

import temper.study.cluster
from temper.errors import TemperError
from temper.study.cluster import slurm_words


@pytest.fixture
def slurm(monkeypatch):
    """A SLURM whose accounting is as given; None: no SLURM."""

    def say(accounting: str | None) -> None:
        def scontrol(words, **_):
            assert words == ("scontrol", "show", "config")
            if accounting is None:
                raise FileNotFoundError("scontrol")
            return SimpleNamespace(
                stdout=(
                    "AccountingStoragePort   = 0\nAccountingStorageType   ="
                    f" {accounting}\nMinJobAge = 300 sec\n"
                )
            )

        monkeypatch.setattr(subprocess, "run", scontrol)
        monkeypatch.setattr(temper.study.cluster, "find_spec", lambda name: name)

    return say


SQUEUE = ["--slurm-status-command", "squeue"]


@pytest.mark.parametrize(
    ("accounting", "words"),
    [
        ("accounting_storage/none", SQUEUE),
        ("(null)", SQUEUE),
        ("accounting_storage/slurmdbd", []),
        (None, []),
    ],
)
@pytest.mark.parametrize(
    "chosen",
    [
        ["--executor", "slurm"],
        ["--executor=slurm"],
        ["--profile", "slurm/profile"],
        ["-e", "slurm", "-n"],
    ],
)
def test_without_accounting_the_queue_is_asked(slurm, accounting, words, chosen):
    slurm(accounting)
    assert slurm_words(chosen) == words


def test_the_users_own_choice_stays(slurm):
    slurm("accounting_storage/none")
    assert slurm_words(["--executor", "slurm", "--slurm-status-command", "sacct"]) == []


@pytest.mark.parametrize(
    "chosen",
    [
        [],
        ["--cores", "4"],
        ["--executor", "local"],
        ["--executor", "dryrun", "--profile", "slurm/profile"],
    ],
)
def test_nothing_is_added_elsewhere(slurm, chosen):
    slurm("accounting_storage/none")
    assert slurm_words(chosen) == []


def test_a_missing_plugin_is_one_line(monkeypatch):
    monkeypatch.setattr(temper.study.cluster, "find_spec", lambda name: None)
    with pytest.raises(TemperError, match=r"executor slurm: .*\[slurm\]"):
        slurm_words(["--profile", "slurm/profile"])
