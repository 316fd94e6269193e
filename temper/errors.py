"""The one exception for mistakes a user can mend."""


class TemperError(ValueError):
    """A mistake in what the user asked for.

    The message is one line that names the flag, the value found, what is accepted and the way
    out. The command line prints it without a traceback and exits with status 2.
    """
