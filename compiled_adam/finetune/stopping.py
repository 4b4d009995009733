"""Why a run ends before its last iteration, and how it is told to."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..base import say


class Asked:
    """Whether somebody asked the run to end: ``signal`` is None, SIGINT (Ctrl-C) or SIGTERM."""

    signal: int | None = None


@contextmanager
def asked_to_stop() -> Iterator[Asked]:
    """Notes the first Ctrl-C or SIGTERM, so that a step can be finished and saved; a second one acts at once.

    In another thread than the main one, where Python cannot handle signals, nothing is noted.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        asked.signal = number
        for each, handler in previous.items():
            signal.signal(each, handler)
        # Not print: the signal may have come in the middle of another one.
        say("\nfinishing the step, then saving; press Ctrl-C once more to stop at once\n")

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        previous[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


_VOTES = {
    int(signal.SIGINT): 1.0,
    int(signal.SIGTERM): 1024.0,
}  # sums of fewer than 1024 of the one are below the other


def vote(number: int | None) -> float:
    """A signal as a number whose sum over workers tells whether any of them got one."""
    return _VOTES.get(number or 0, 0.0)


def elected(votes: float) -> int | None:
    """The signal that a sum of `vote` stands for: SIGTERM if any worker got that.

    >>> elected(0.0), elected(vote(signal.SIGINT) + vote(None)) == signal.SIGINT
    (None, True)
    """
    return next((number for number in (int(signal.SIGTERM), int(signal.SIGINT)) if votes >= _VOTES[number]), None)


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
