"""The reasons why a run ends before its last iteration: signals, and errors of MLX."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..base import say

# A sum of fewer than 1024 votes for SIGINT is below one vote for SIGTERM.
_VOTES = {int(signal.SIGINT): 1.0, int(signal.SIGTERM): 1024.0}


class Asked:
    """Whether somebody asked the run to end: ``signal`` is None, SIGINT (Ctrl-C) or SIGTERM.

    Several workers get their signals at different times. Each step sums their votes, so that all stop after the same.
    """

    def __init__(self, many: bool) -> None:
        self.many = many
        self.signal: int | None = None
        self._elected: int | None = None

    def vote(self) -> float:
        """The signal of this worker as a number. The sum over all workers tells whether any of them got one."""
        return _VOTES.get(self.signal or 0, 0.0)

    def count(self, votes: float) -> None:
        """Takes a sum of `vote`: SIGTERM if any worker got that, else SIGINT.

        >>> asked = Asked(many=True)
        >>> asked.count(2.0)
        >>> asked.agreed == signal.SIGINT
        True
        """
        numbers = (int(signal.SIGTERM), int(signal.SIGINT))
        self._elected = next((number for number in numbers if votes >= _VOTES[number]), self._elected)

    @property
    def agreed(self) -> int | None:
        """The signal to stop for, which all workers know."""
        return self._elected if self.many else self.signal


@contextmanager
def asked_to_stop(many: bool = False) -> Iterator[Asked]:
    """Notes the first Ctrl-C or SIGTERM, so that a step can be finished and saved; a second one acts at once.

    ``many`` says whether there are other workers. In another thread than the main one, where Python cannot handle
    signals, nothing is noted.
    """
    asked = Asked(many)
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        asked.signal = number
        for each, handler in previous.items():
            signal.signal(each, handler)
        # Not print: the signal may have come in the middle of another one. The bar is not left behind.
        live = os.isatty(2) and os.environ.get("TERM") != "dumb"
        begin = "\r\x1b[2K" if live else "\n"
        say(f"{begin}finishing the step, then saving; press Ctrl-C once more to stop at once\n")

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        previous[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of MLX, whose backends all raise RuntimeError, means that memory was not enough."""
    found = re.search(r"out of memory|insufficient memory|unable to allocate|attempting to allocate", str(error), re.I)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and found is not None)


def is_lost_evaluation(error: BaseException) -> bool:
    """Whether an error of MLX means that what the device was computing is lost, so that it cannot be saved.

    >>> is_lost_evaluation(RuntimeError("[METAL] Command buffer execution failed: Internal Error"))
    True
    >>> is_lost_evaluation(RuntimeError("dictionary changed size during iteration"))
    False
    """
    lost = r"^\[(eval|\w+::eval_\w+|metal|metal::\w+|cuda\w*)\]|^cuda\w* failed|without a primitive|^There is no Stream"
    found = isinstance(error, RuntimeError) and re.search(lost, str(error), re.I) is not None
    return found or is_out_of_memory(error)
