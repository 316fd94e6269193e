"""The exception for errors that a user can fix, and the one guess at what a wrong name meant."""

import difflib
from collections.abc import Iterable


class TemperError(ValueError):
    """An invalid setting, file or command.

    The message is one line that names the flag, the value found, what is accepted and the way
    out. The command line prints it without a traceback and exits with status 2.
    """


def close_names(name: str, known: Iterable[str], n: int = 1, cutoff: float = 0.6) -> list[str]:
    """Up to ``n`` known names that are spelled like a wrong one, the closest first."""
    return difflib.get_close_matches(name, sorted(set(known)), n=n, cutoff=cutoff)


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """A question for the end of an error message.

    Args:
        name: The name that is not known.
        known: The names that are.
        otherwise: Returned where none of them is close.
    """
    close = close_names(name, known)
    return f"did you mean {close[0]!r}?" if close else otherwise
