"""Files of a run folder: whole or not at all."""

import json
from pathlib import Path

import pytest

from temper.run_folder import write_json, write_json_lines, write_text


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

    def half(self: Path, text: str, **kwargs: str) -> None:
        with self.open("w") as file:
            file.write(text[:2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "the new version")
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
