"""A judge model in a folder that tests only read."""

from pathlib import Path

import pytest

from tests.judges.models import CHAT, lm_folder


@pytest.fixture(scope="session")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small language model and a tokenizer with the template `CHAT`."""
    return lm_folder(tmp_path_factory.mktemp("lm"), CHAT)
