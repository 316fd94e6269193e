"""Files of a run folder: whole or not at all."""

import io
import json
import os
from pathlib import Path

import pytest

from temper.errors import TemperError
from temper.run_folder import open_lock, write_json, write_json_lines, write_text


def test_a_file_is_written_with_its_folders(tmp_path):
    path = tmp_path / "a" / "b" / "note.txt"
    write_text(path, "é θ g\n")
    assert path.read_text(encoding="utf-8") == "é θ g\n"
    assert [file.name for file in path.parent.iterdir()] == ["note.txt"]


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "note.txt"
    write_text(path, "a long first version")
    write_text(path, "short")
    assert path.read_text() == "short"


def test_a_reader_never_meets_half_a_file(tmp_path, monkeypatch):
    path = tmp_path / "note.txt"
    write_text(path, "old")

    class Full(io.TextIOWrapper):
        def write(self, text: str) -> int:
            super().write(text[:2])
            raise OSError("disk full")

    monkeypatch.setattr(Path, "open", lambda self, mode, **_: Full(open(self, f"{mode}b")))  # noqa: SIM115
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "the new version")
    monkeypatch.undo()
    assert path.read_text() == "old"


def test_json_reads_back_and_is_indented(tmp_path):
    content = {"hs": {"value": 0.25, "n": 200}, "name": "θ"}
    write_json(tmp_path / "card.json", content)
    text = (tmp_path / "card.json").read_text()
    assert json.loads(text) == content
    assert text.endswith("}\n")
    assert '\n  "hs": {' in text


def test_content_that_is_not_json_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "card.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "card.json", {"a": object()})
    assert json.loads((tmp_path / "card.json").read_text()) == {"a": 1}


def test_json_lines_are_one_object_a_line(tmp_path):
    rows = [{"prompt": "a\nb"}, {"prompt": "c"}]
    write_json_lines(tmp_path / "generations.jsonl", iter(rows))
    assert [
        json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()
    ] == rows


def test_writing_replaces_a_link_and_not_what_it_names(tmp_path):
    own = tmp_path / "thesis.txt"
    own.write_text("years of work")
    (tmp_path / "card.json").symlink_to(own)
    (tmp_path / f".card.json.{os.getpid()}").symlink_to(own)  # the temporary name
    write_json(tmp_path / "card.json", {"a": 1})
    assert own.read_text() == "years of work"
    assert not (tmp_path / "card.json").is_symlink()
    assert json.loads((tmp_path / "card.json").read_text()) == {"a": 1}


def test_a_lock_is_opened_through_no_link(tmp_path):
    own = tmp_path / "thesis.txt"
    own.write_text("years of work")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(own)
    with pytest.raises(TemperError, match="lock cannot be opened .a symbolic link.*delete it"):
        open_lock(tmp_path / "run")
    assert own.read_text() == "years of work"


def test_a_lock_of_something_else_is_one_line(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(TemperError, match="lock cannot be opened .Is a directory"):
        open_lock(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(TemperError, match="lock cannot be opened .*another folder"):
        open_lock(tmp_path / "file")


def test_opening_a_lock_keeps_what_is_in_it(tmp_path):
    (tmp_path / ".lock").write_text("kept")
    open_lock(tmp_path).close()
    assert (tmp_path / ".lock").read_text() == "kept"
