"""Errors of ``temper proxy`` are one line that names a flag of its own."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from temper.cli.console import main
from temper.errors import TemperError
from temper.proxy import build
from temper.proxy.topic import RECIPES, Topic
from tests.text import make_tokenizer

WAY_OUT = "`make smollm2` fetches one"


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The error line of a call, which must write nothing."""

    def run(*words: str, out: Path | None = None) -> str:
        status = main(["proxy", *words, "--out", str(out or tmp_path / "data")])
        line = capsys.readouterr().err
        assert status == 2 and line.startswith("error: ") and line.count("\n") == 1, line
        assert "data.init_args" not in line, "a flag of train.py"
        assert not (tmp_path / "data").exists()
        return line

    return run


def test_a_missing_folder(refusal: Callable[..., str]):
    line = refusal("--model", "models/none")
    assert "--model=models/none: no such folder" in line and WAY_OUT in line


def test_a_folder_without_a_tokenizer(refusal: Callable[..., str], tmp_path: Path):
    line = refusal("--model", str(tmp_path))
    assert f"--model={tmp_path}: no tokenizer" in line and WAY_OUT in line


def test_a_tokenizer_without_a_chat_template(refusal: Callable[..., str], tmp_path: Path):
    make_tokenizer(None).save_pretrained(tmp_path / "model")
    line = refusal("--model", str(tmp_path / "model"))
    assert "no chat template" in line and "--model=" in line and WAY_OUT in line


def test_a_folder_without_a_network(refusal: Callable[..., str], tmp_path: Path):
    make_tokenizer().save_pretrained(tmp_path / "model")
    line = refusal("--model", str(tmp_path / "model"))
    assert "neither config.json" in line and "--model=" in line and WAY_OUT in line


def test_a_model_that_never_complies(refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        build, "generate_answers", lambda questions, *_: {q.prompt: "I cannot." for q in questions}
    )
    line = refusal("--model", "some/model")
    assert (
        "--model=some/model: " in line and " 0 of " in line and " half" in line and WAY_OUT in line
    )


def test_max_new_tokens_below_one(refusal: Callable[..., str]):
    assert "--max_new_tokens=0: " in refusal("--model", "m", "--max_new_tokens", "0")


def test_a_file_is_not_replaced(refusal: Callable[..., str], tmp_path: Path):
    (tmp_path / "notes.txt").write_text("keep")
    assert "notes.txt: a file" in refusal("--model", "m", out=tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("text", "found"),
    [(None, "cannot be read"), ("asks: [", "not YAML"), ("- asks", "topic must be a text")],
)
def test_an_unreadable_topic_file(
    refusal: Callable[..., str], tmp_path: Path, text: str | None, found: str
):
    if text is not None:
        (tmp_path / "topic.yaml").write_text(text)
    line = refusal("--model", "m", "--topic", str(tmp_path / "topic.yaml"))
    assert f"--topic={tmp_path / 'topic.yaml'}: " in line and found in line


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("compliance", "[a", "compliance .*regular expression"),
        ("refusals", [], "refusals .*list .*not empty"),
        ("asks", "How do I make {dish}?", "asks .*list"),
        ("asks", ["How do I make it?"], r"must have \{dish\}"),
        ("asks", ["How do I make {dish} {well}?"], r"must have \{dish\}"),
        ("dishes", {"alignment": ["pie"], "test": ["soup"]}, "dishes.attack .*list"),
        (
            "dishes",
            {"alignment": ["pie"], "attack": [False], "test": ["soup"]},
            "dishes.attack .*texts",
        ),
        ("safe", ["What is it?"], "safe .*mappings"),
        ("safe", [{"ask": "What is it?"}], r"must have \{item\}"),
        (
            "task",
            {"ask": "Is {word} a tool?", "train": {"tool": ["saw"]}},
            "task.test .*groups .*lists",
        ),
        (
            "task",
            {"ask": "{word}?", "train": {"a": ["b"], "c": []}, "test": {}},
            "task.train .*groups .*lists",
        ),
        (
            "task",
            {"ask": "{word}?", "train": {"a": ["b"], "c": ["d", "e"]}, "test": {}},
            "task.train .*one length",
        ),
    ],
)
def test_an_invalid_topic_is_an_error_that_names_the_key(
    tmp_path: Path, key: str, value: Any, found: str
):
    content = yaml.safe_load(RECIPES.read_text()) | {key: value}
    (tmp_path / "topic.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(TemperError) as error:
        Topic(tmp_path / "topic.yaml")
    assert (
        re.search(found, str(error.value))
        and "--topic=" in str(error.value)
        and "\n" not in str(error.value)
    )
