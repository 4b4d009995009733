"""Errors that are for a user to read: input that cannot be used, and a run that could not go on."""

from __future__ import annotations

from collections.abc import Callable


class InputError(ValueError):
    """An argument, an option, a file or data that cannot be used. The message says what to do instead.

    The command line shows the message alone. Every other error keeps its traceback, because it is a fault of the
    program and not of its input.
    """


class TrainingStopped(RuntimeError):
    """A run that could not go on. Its message says why, and what was saved."""


def while_handling(error: BaseException, wanted: Callable[[BaseException], bool]) -> BaseException | None:
    """``error``, or the one during whose handling it was raised, and so on: the first that is ``wanted``."""
    found: BaseException | None = error
    while found is not None and not wanted(found):
        found = found.__context__
    return found
