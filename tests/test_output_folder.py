"""Folders that are written whole: only new ones and Temper's own are replaced."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from temper.errors import TemperError
from temper.output_folder import MARKER, check_target, staging_folder
from tests.errors import error_line

WRITER = "temper test"


def write(folder: Path, files: dict[str, str], writer: str = WRITER) -> None:
    """Write a folder as exports do."""
    with staging_folder(folder, "--out", writer) as staging:
        for name, text in files.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_text(text)


def tree(root: Path) -> dict[str, str]:
    """Everything below a folder, by name: what links name, and what files hold."""
    found = {}
    for folder, names, files in os.walk(root):
        for path in (Path(folder) / name for name in (*names, *files)):
            if path.is_symlink():
                found[str(path.relative_to(root))] = f"-> {path.readlink()}"
            else:
                content = path.read_bytes().hex() if path.is_file() else "folder"
                found[str(path.relative_to(root))] = content
    return found


def refusal(folder: Path) -> str:
    """The one line that refuses a target; nothing at all is changed."""
    before = tree(folder.parent)
    line = error_line(lambda: write(folder, {"a.txt": "new"}))
    assert error_line(lambda: check_target(folder, "--out", WRITER)) == line
    assert tree(folder.parent) == before
    return line


# -- what may be replaced


def test_a_new_folder_is_made_with_its_parents_and_a_marker(tmp_path):
    write(tmp_path / "a" / "b", {"x.txt": "one", "deep/y.txt": "two"})
    assert (tmp_path / "a" / "b" / "deep" / "y.txt").read_text() == "two"
    marker = json.loads((tmp_path / "a" / "b" / MARKER).read_text())
    assert marker["written_by"] == WRITER
    assert {name: entry["size"] for name, entry in marker["files"].items()} == {
        "x.txt": 3,
        "deep/y.txt": 3,
    }
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_an_empty_folder_and_ones_own_are_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", {"x.txt": "one", "deep/y.txt": "two"})
    write(tmp_path / "out", {"z.txt": "three"})
    assert set(tree(tmp_path)) == {"out", f"out/{MARKER}", "out/z.txt"}


def test_a_copy_of_ones_own_is_ones_own(tmp_path):
    write(tmp_path / "out", {"x.txt": "one"})
    shutil.copytree(tmp_path / "out", tmp_path / "copied")
    (tmp_path / "copied" / ".snakemake_timestamp").touch()
    write(tmp_path / "copied", {"x.txt": "two"})
    assert (tmp_path / "copied" / "x.txt").read_text() == "two"


def test_what_is_left_of_ones_own_is_replaced(tmp_path):
    write(tmp_path / "out", {"x.txt": "one", "y.txt": "two"})
    (tmp_path / "out" / "x.txt").unlink()
    write(tmp_path / "out", {"x.txt": "three"})
    assert (tmp_path / "out" / "x.txt").read_text() == "three"


def test_a_linked_parent_is_resolved(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "runs").symlink_to("scratch")
    for text in ("one", "two"):
        write(tmp_path / "runs" / "mine" / "export", {"x.txt": text})
    assert (tmp_path / "scratch" / "mine" / "export" / "x.txt").read_text() == "two"
    assert (tmp_path / "runs").is_symlink()


def test_a_failure_changes_nothing_and_leaves_nothing(tmp_path):
    write(tmp_path / "out", {"x.txt": "one"})
    before = tree(tmp_path)
    with pytest.raises(RuntimeError), staging_folder(tmp_path / "out", "--out", WRITER) as staging:
        (staging / "x.txt").write_text("half")
        raise RuntimeError
    assert tree(tmp_path) == before


# -- what may not

OTHERS = {
    "a user's file": (lambda out: (out / "notes.txt").write_text("mine"), "holds notes.txt"),
    "a file in a new folder": (
        lambda out: [(out / "own").mkdir(), (out / "own" / "a").write_text("mine")],
        "holds own/a, which Temper did not write",
    ),
    "an empty folder": (lambda out: (out / "later").mkdir(), "holds later/"),
    "a changed file": (lambda out: (out / "x.txt").write_text("my edit"), "x.txt.*was changed"),
    "a file of the same size": (lambda out: (out / "x.txt").write_text("two"), "x.txt.*changed"),
    "a link": (lambda out: (out / "link").symlink_to("x.txt"), "holds link"),
    "a link in a file's place": (
        lambda out: [(out / "x.txt").unlink(), (out / "x.txt").symlink_to("deep/y.txt")],
        "holds x.txt",
    ),
    "a link in a folder's place": (
        lambda out: [shutil.move(out / "deep", out.parent), (out / "deep").symlink_to("../deep")],
        "holds deep",
    ),
    "a linked marker": (
        lambda out: [
            (out / MARKER).rename(out.parent / "m"),
            (out / MARKER).symlink_to(out.parent / "m"),
        ],
        f"no {MARKER}",
    ),
    "no marker": (lambda out: (out / MARKER).unlink(), f"no {MARKER}.*earlier versions"),
    "a damaged marker": (lambda out: (out / MARKER).write_text("{"), f"no {MARKER}"),
    "a marker of another shape": (lambda out: (out / MARKER).write_text("[[[]]]"), f"no {MARKER}"),
    "a marker of lists": (
        lambda out: (out / MARKER).write_text('{"written_by": "temper test", "files": {"a": []}}'),
        f"no {MARKER}",
    ),
    "a named pipe": (lambda out: os.mkfifo(out / "pipe"), "holds pipe"),
    "a pipe as a timestamp": (lambda out: os.mkfifo(out / ".snakemake_timestamp"), "holds .snake"),
    "a name over two lines": (lambda out: (out / "a\nb").write_text(""), r"holds 'a\\nb'"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_folder_that_is_more_than_ones_own_is_refused(tmp_path, case):
    change, message = OTHERS[case]
    write(tmp_path / "out", {"x.txt": "one", "deep/y.txt": "two"})
    change(tmp_path / "out")
    line = refusal(tmp_path / "out")
    assert line.startswith(f"--out={tmp_path / 'out'}: ") and "give another folder" in line
    with pytest.raises(TemperError, match=message):
        check_target(tmp_path / "out", "--out", WRITER)


def test_the_output_of_another_verb_is_refused(tmp_path):
    write(tmp_path / "out", {"x.txt": "one"}, writer="temper edit")
    assert "was written by temper edit, not by temper test" in refusal(tmp_path / "out")


def test_links_files_and_places_are_refused(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "nowhere").symlink_to("missing")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("mine")
    assert "a symbolic link" in refusal(tmp_path / "link")
    assert "a symbolic link" in refusal(tmp_path / "nowhere")
    assert "a symbolic link" in refusal(tmp_path / "loop")
    assert "no path for a folder" in refusal(tmp_path / "loop" / "out")
    assert "a file; give the name of a folder" in refusal(tmp_path / "file")
    assert "file is a file; give another place" in refusal(tmp_path / "file" / "a" / "out")
    assert "names no folder of its own" in refusal(tmp_path / "real" / "..")
    assert "no path for a folder" in refusal(tmp_path / ("n" * 300))
    assert "no path for a folder" in refusal(tmp_path / "a\0b")
    monkeypatch.chdir(tmp_path / "real")
    assert "names no folder of its own" in error_line(lambda: check_target(Path(), "--out", ""))
    assert "in use as it is" in refusal(tmp_path / "real")


# -- what happens while it is written


def test_a_target_taken_meanwhile_is_kept_and_so_is_the_work(tmp_path):
    out = tmp_path / "out"
    with (
        pytest.raises(TemperError, match=r"holds notes.txt.*what was to be written is in .*out-1$"),
        staging_folder(out, "--out", WRITER) as staging,
    ):
        (staging / "x.txt").write_text("hours of work")
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    assert (out / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out-1" / "x.txt").read_text() == "hours of work"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out-1"}


def test_a_link_put_there_meanwhile_is_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    out = tmp_path / "out"
    with pytest.raises(TemperError, match="link"), staging_folder(out, "--out", WRITER):
        out.symlink_to("mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine" and out.is_symlink()


def test_a_file_added_during_the_exchange_survives(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, {"x.txt": "one"})
    rename = os.rename

    def slow_rename(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(target).name.endswith("-old"):
            (Path(target) / "notes.txt").write_text("mine")

    monkeypatch.setattr(os, "rename", slow_rename)
    with pytest.warns(UserWarning, match="is kept: files were put there"):
        write(out, {"x.txt": "two"})
    kept = next(path for path in tmp_path.iterdir() if path != out)
    assert (kept / "notes.txt").read_text() == "mine" and (out / "x.txt").read_text() == "two"


def test_a_rename_that_fails_puts_the_folder_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, {"x.txt": "one"})
    rename = os.rename

    def failing_rename(source: Path, target: Path) -> None:
        if Path(target) == out and not str(source).endswith("-old"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing_rename)
    with pytest.raises(TemperError, match="out-1"):
        write(out, {"x.txt": "two"})
    assert (out / "x.txt").read_text() == "one"
    assert (tmp_path / "out-1" / "x.txt").read_text() == "two"


# -- any tree of files, folders and links

NAMES = st.sampled_from(["a", "b", "x.txt", MARKER, ".snakemake_timestamp"])
PLACES = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
TARGETS = st.sampled_from(["..", "../own", "/nowhere", "a", "x.txt", "../own/thesis.txt", "."])
ENTRIES = st.one_of(
    st.tuples(st.just("file"), PLACES, st.sampled_from(["one", "two", ""])),
    st.tuples(st.just("folder"), PLACES, st.just("")),
    st.tuples(st.just("link"), PLACES, TARGETS),
    st.tuples(st.just("delete"), PLACES, st.just("")),
)


def _change(out: Path, entries: list[tuple[str, str, str]]) -> None:
    for kind, place, value in entries:
        path = out / place
        try:
            if kind == "delete":
                path.unlink()
            elif kind == "folder":
                path.mkdir(parents=True)
            elif kind == "link":
                path.symlink_to(value)
            elif path.resolve().is_relative_to(out.resolve()):
                path.write_text(value)
        except OSError:
            continue  # there is something else of that name


@given(start=st.booleans(), entries=st.lists(ENTRIES, max_size=6))
def test_nothing_that_is_not_ours_is_ever_changed(tmp_path_factory, start, entries):
    root = tmp_path_factory.mktemp("tree")
    out = root / "out"
    (root / "own").mkdir()
    (root / "own" / "thesis.txt").write_text("years of work")
    ours: dict[str, str] = {}
    if start:
        write(out, {"x.txt": "one", "a/b": "two"})
        ours = tree(out)
    else:
        out.mkdir()
    _change(out, entries)
    before = tree(root)
    added = {
        name: content
        for name, content in tree(out).items()
        if ours.get(name) != content and Path(name).name != ".snakemake_timestamp"
    }
    try:
        write(out, {"x.txt": "new"})
    except TemperError:
        assert tree(root) == before
    else:
        assert not added
        assert set(tree(out)) == {"x.txt", MARKER}
        assert set(tree(root)) == {"out", "out/x.txt", f"out/{MARKER}", "own", "own/thesis.txt"}
    assert (root / "own" / "thesis.txt").read_text() == "years of work"
