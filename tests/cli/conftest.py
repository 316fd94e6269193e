"""The check of a refusal (one line, exit status 2, nothing trained), and a config as printed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


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


@pytest.fixture
def print_config(command_line, capsys) -> Callable[..., dict[str, Any]]:
    """What ``--print_config`` prints for these files and words."""

    def printed(configs: list[str], *words: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as left:
            command_line(
                "fit", *(f"--config={config}" for config in configs), *words, "--print_config"
            )
        output = capsys.readouterr()
        assert left.value.code in (0, None), output.err
        return yaml.safe_load(output.out)

    return printed
