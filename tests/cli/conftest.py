"""The check of a refusal: one line, exit status 2, and nothing trained."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def refused(temper, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a fit that must be refused before it trains; returns the one line it prints."""

    def refuse(*words: str, verb: str = "fit", **parts: object) -> str:
        folder = tmp_path / "refused"
        with pytest.raises(SystemExit) as left:
            temper(verb, folder, *words, **parts)
        printed = capsys.readouterr()
        assert left.value.code == 2
        assert printed.out == ""
        assert (
            printed.err.startswith("error: ")
            and printed.err.count("\n") == 1
            and printed.err.endswith("\n")
        ), printed.err
        left_over = {path.name for path in folder.glob("*")} & {
            "metrics.csv",
            "export",
            "card.json",
            "evaluation.json",
        }
        assert not left_over, f"it trained: {left_over}"
        return printed.err.removeprefix("error: ").rstrip("\n")

    return refuse
