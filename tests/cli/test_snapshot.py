"""The code of a run is recorded, and one process at a time holds a run folder."""

import fcntl
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import temper.cli.snapshot
from temper.cli.snapshot import hold_run_folder, write_snapshot

HOLDER = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held',"
    " flush=True); sys.stdin.read()"
)


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


# -- the lock of a run folder


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds the folder until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / ".lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def first_rank(monkeypatch):
    for name in ("LOCAL_RANK", "SLURM_PROCID", "RANK"):
        monkeypatch.delenv(name, raising=False)


def _is_free(folder: Path) -> bool:
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_a_folder_in_use_is_waited_for_and_then_held(holder, tmp_path, capsys):
    locks = []
    waiting = threading.Thread(target=lambda: locks.append(hold_run_folder(tmp_path)), daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive(), "it did not wait"
    assert f"{tmp_path} is in use by another process" in capsys.readouterr().err
    holder.stdin.close()
    waiting.join(30)
    assert not waiting.is_alive() and not _is_free(tmp_path)
    locks[0].close()
    assert _is_free(tmp_path)


def test_a_process_that_is_killed_leaves_no_lock_behind(holder, tmp_path):
    assert not _is_free(tmp_path)
    holder.kill()
    holder.wait()
    hold_run_folder(tmp_path).close()


@pytest.mark.parametrize("name", ["LOCAL_RANK", "SLURM_PROCID", "RANK"])
def test_other_ranks_do_not_wait(holder, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert hold_run_folder(tmp_path) is None


def test_the_folder_is_held_while_training_and_free_afterwards(temper, tmp_path, monkeypatch):
    from callbacks import RunCard

    free = []
    monkeypatch.setattr(RunCard, "on_train_start", lambda *_: free.append(_is_free(tmp_path)))
    temper("fit", tmp_path)
    assert free == [False] and _is_free(tmp_path)


def test_the_folder_is_free_after_a_refusal(temper, tmp_path):
    with pytest.raises(SystemExit):
        temper("fit", tmp_path, "--config=configs/objective/booster.yaml")
    assert (tmp_path / ".lock").exists() and _is_free(tmp_path)
