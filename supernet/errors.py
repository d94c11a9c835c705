"""The one exception that means: what was asked for cannot be done, and here is what to do."""


class InputError(ValueError):
    """A mistake in what the user gave. The message says what holds, what was given and what to do; the command line exits with 2."""
