"""Errors for users: unusable input, and a training run that had to stop; and the nearest word to a misspelled one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable


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


def did_you_mean(word: str, known: Iterable[str], before: str = "", after: str = "") -> str:
    """The end of a sentence about a misspelled word; empty if nothing ``known`` is like it.

    ``before`` and ``after`` stand around the word, such as the folder before a name.

    >>> did_you_mean("--bach-size", ["--batch-size", "--batch-tokens"]), did_you_mean("--x", ["--batch-size"])
    ('; did you mean --batch-size?', '')
    """
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {before}{near[0]}{after}?" if near else ""
