"""The one line of an error; small, but read by tests of several folders."""

from collections.abc import Callable

import pytest

from temper.errors import TemperError


def error_line(action: Callable[[], object]) -> str:
    """The message of the `TemperError` that ``action`` must raise, after checking that it is one
    line.
    """
    with pytest.raises(TemperError) as caught:
        action()
    line = str(caught.value)
    assert line and "\n" not in line
    return line
