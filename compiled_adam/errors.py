"""The one kind of error that a user can mend."""

from __future__ import annotations


class InputError(ValueError):
    """An argument, an option, a file or data that cannot be used. The message says what to do instead.

    The command line shows the message alone. Every other error keeps its traceback, because it is a fault of the
    program and not of its input.
    """
