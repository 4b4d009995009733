"""Errors for users: unusable input, and a training run that had to stop."""

from __future__ import annotations

import re
from collections.abc import Callable


class InputError(ValueError):
    """An argument, an option, a file or data is unusable. The message says what to do instead.

    The command line shows the message without a traceback. Other errors keep the traceback, because they are faults of
    the program and not of the input.
    """


class TrainingStopped(RuntimeError):
    """A training run had to stop. The message says why, and what was saved."""


def is_lost(error: BaseException) -> bool:
    """Whether ``error`` is MLX's error for unreachable workers. All backends raise it as RuntimeError."""
    return isinstance(error, RuntimeError) and bool(re.search(r"\[(ring|jaccl|nccl|mpi)\]|nccl", str(error), re.I))


def while_handling(error: BaseException, wanted: Callable[[BaseException], bool]) -> BaseException | None:
    """The first error for which ``wanted`` is true in the chain of ``error``, ``error.__context__``, and so on."""
    found: BaseException | None = error
    while found is not None and not wanted(found):
        found = found.__context__
    return found
