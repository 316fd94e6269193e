"""What code a run was started with, known from its first moment on."""

import json
import subprocess
from pathlib import Path

import pytest

import temper.cli.snapshot
from temper.cli.snapshot import write_snapshot


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A git checkout that takes the project's place."""
    place = tmp_path / "checkout"
    (place / "temper" / "cli").mkdir(parents=True)
    (place / "temper" / "cli" / "snapshot.py").write_text("old = 1\n")
    for words in (
        ("init", "-q"),
        ("add", "."),
        ("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "first"),
    ):
        subprocess.run(("git", "-C", str(place), *words), check=True)
    monkeypatch.setattr(temper.cli.snapshot, "ROOT", place)
    return place


def test_a_clean_checkout_is_its_commit(checkout, tmp_path):
    (tmp_path / "code.diff").write_text("of an earlier run")
    write_snapshot(tmp_path)
    code = json.loads((tmp_path / "code.json").read_text())
    assert (
        len(code["commit"]) == 40
        and code["differs"] is False
        and not (tmp_path / "code.diff").exists()
    )
    assert code["packages"]["torch"].startswith("2.") and code["command"].startswith("python")


def test_the_diff_has_new_files_of_code_too(checkout, tmp_path):
    (checkout / "temper" / "cli" / "snapshot.py").write_text("new = 2\n")
    (checkout / "objective.py").write_text("mine = 3\n")
    (checkout / "rows.jsonl").write_text("private\n")
    before = subprocess.run(
        ("git", "-C", str(checkout), "status", "--short"), capture_output=True, text=True
    ).stdout
    write_snapshot(tmp_path)
    assert json.loads((tmp_path / "code.json").read_text())["differs"] is True
    difference = (tmp_path / "code.diff").read_text()
    assert "-old = 1\n+new = 2" in difference and "+mine = 3" in difference
    assert "private" not in difference, "data never go into a run folder by themselves"
    assert (
        subprocess.run(
            ("git", "-C", str(checkout), "status", "--short"), capture_output=True, text=True
        ).stdout
        == before
    )
    target = tmp_path / "applied"
    subprocess.run(("git", "clone", "-q", str(checkout), str(target)), check=True)
    subprocess.run(("git", "-C", str(target), "apply", str(tmp_path / "code.diff")), check=True)
    assert (target / "objective.py").read_text() == "mine = 3\n"


def test_without_git_there_are_still_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(temper.cli.snapshot, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", "")
    write_snapshot(tmp_path)
    code = json.loads((tmp_path / "code.json").read_text())
    assert code["commit"] == "not a git checkout" and code["packages"]["lightning"].startswith("2.")
