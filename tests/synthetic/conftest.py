"""The fixture `language`: every shared small language in turn."""

import pytest

from temper.synthetic import Language


@pytest.fixture(params=["tiny", "two_pairs", "paper"])
def language(request: pytest.FixtureRequest) -> Language:
    """Each of the languages of the main conftest.py in turn."""
    return request.getfixturevalue(request.param)
