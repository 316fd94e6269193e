"""`temper study`: one process per study; an error is one line."""

import fcntl

import pytest

import temper.cli.verbs.study
from temper.cli.verbs.study import main
from temper.report import html


@pytest.fixture
def snakemake(monkeypatch) -> list[list[str]]:
    """Records what Snakemake would be told, and runs nothing."""
    calls: list[list[str]] = []
    monkeypatch.setattr(
        temper.cli.verbs.study,
        "_snakemake",
        lambda options, words: calls.append([options.cores, *words]) or 7,
    )
    return calls


def test_a_second_runner_of_the_same_study_is_refused(snakemake, tmp_path, capsys):
    (tmp_path / "ci").mkdir()
    with open(tmp_path / "ci" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["studies/ci.yaml", "--runs", str(tmp_path)]) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1
        assert str(tmp_path / "ci") in line and "another process" in line and "--runs" in line
        assert snakemake == []
        assert main(["studies/ci.yaml", "--runs", str(tmp_path / "other")]) == 7, (
            "another folder is free"
        )
    assert main(["studies/ci.yaml", "--runs", str(tmp_path)]) == 7, (
        "the lock is gone with its holder"
    )


def test_the_folder_is_held_while_the_study_runs(monkeypatch, tmp_path):
    def second(options, words) -> int:
        with open(tmp_path / "ci" / ".lock", "w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return 0

    monkeypatch.setattr(temper.cli.verbs.study, "_snakemake", second)
    assert main(["studies/ci.yaml", "--runs", str(tmp_path)]) == 0


def test_everything_after_the_study_goes_to_snakemake(snakemake, tmp_path):
    main(
        [
            "studies/ci.yaml",
            "--runs",
            str(tmp_path),
            "--cores",
            "3",
            "--retries",
            "2",
            "--keep-going",
        ]
    )
    assert snakemake == [["3", "--retries", "2", "--keep-going", "--logger", "temper"]]


def test_an_error_in_the_study_is_one_line(snakemake, write_study, tmp_path, capsys):
    assert main([str(write_study(seed=[1])), "--runs", str(tmp_path / "runs")]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and "'seeds'" in line
    assert snakemake == [] and not (tmp_path / "runs").exists()


def test_an_error_of_the_report_is_one_line(write_study, tmp_path, capsys):
    assert html.main([str(tmp_path), "--study", str(write_study(seed=[1]))]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
