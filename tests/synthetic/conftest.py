"""The fixtures `language` and `simple`: the shared small languages in turn."""

import pytest

from temper.synthetic import Language


@pytest.fixture(params=["tiny", "two_pairs", "paper"])
def language(request: pytest.FixtureRequest) -> Language:
    """Each of the languages of the main conftest.py in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["tiny", "two_pairs"])
def simple(request: pytest.FixtureRequest) -> Language:
    """Each of the languages with the simpler options in turn."""
    return request.getfixturevalue(request.param)
