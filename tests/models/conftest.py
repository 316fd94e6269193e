"""A base model and an adapter on it, in folders that tests only read."""

from pathlib import Path

import pytest

from temper.models.lora import save_adapter
from tests.models.networks import LORA, build, disturb, save_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network and its tokenizer."""
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def adapter(base: Path) -> Path:
    """A folder with a trained adapter on `base`, without a tokenizer: the base has that."""
    folder = base.parent / "adapter"
    folder.mkdir()
    save_adapter(disturb(build(base, lora=LORA)), folder)
    return folder
