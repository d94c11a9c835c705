"""The one exception that means: what was asked for cannot be done, and here is what to do."""

import sys


class InputError(ValueError):
    """A mistake in what the user gave. The message says what holds, what was given and what to do; the command line exits with 2."""


def say(error: BaseException) -> None:
    """Say it in one line on standard error, written at once: what other processes of a job write does not get between its words."""
    words = " ".join(str(error).splitlines())  # a name in it may hold line breaks
    print(f"nestling: {words}\n", end="", file=sys.stderr)
