"""Study files in a temporary folder, read from the project's root."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def project_root(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Paths in a study are relative to the project's root."""
    monkeypatch.chdir(ROOT)
    return ROOT


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[..., Path]:
    """A study on top of ci.yaml; a key given as None is left out, one with None inside a mapping
    stays.
    """

    def write(
        base: str | None = str(ROOT / "studies" / "ci.yaml"), file: str = "study.yaml", **keys: Any
    ) -> Path:
        content = ({"base": base} if base else {}) | {"name": "mine"} | keys
        path = tmp_path / file
        path.write_text(
            yaml.safe_dump({key: value for key, value in content.items() if value is not None})
        )
        return path

    return write


@pytest.fixture
def with_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's root in which the models of the studies here are: folders, and nothing in
    them.
    """
    root = tmp_path / "root"
    for model in ("smollm2-135m-instruct", "some"):
        (root / "models" / model).mkdir(parents=True)
    for place in ("configs", "studies"):
        (root / place).symlink_to(ROOT / place)
    monkeypatch.chdir(root)
    return root
