"""``mx.compile`` with a limit on the number of traces.

A trace is the graph that MLX records when it runs a Python function. ``mx.compile`` keeps every trace for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count
from typing import Any

import mlx.core as mx

from . import random_state

_thread = threading.local()
_serials = count()


class _End:
    """Drops the traces of a thread when the thread ends.

    MLX keeps traces per thread, and drops them only after Python has released the thread. If the process exits at that
    moment, Python ends the thread while MLX frees the Python objects of a trace, and this aborts the process.
    """

    def __del__(self, clear: Callable[[], None] = mx.clear_streams) -> None:
        clear()


class Compiled:
    """A compiled ``function`` that drops all traces when there are more than ``most``.

    Every new shape, dtype or Python number makes a new trace. Without a limit, an optimizer whose numbers change at
    every step would fill the memory. ``draws``: whether the function uses MLX's global random state.
    """

    def __init__(self, function: Callable[..., Any], most: int, draws: bool = False) -> None:
        self._function = function
        self._most = max(most, 2)  # with 1, every call would come after the last trace
        self._compile = random_state.compiled if draws else mx.compile
        self._begin()

    def _begin(self) -> None:
        function, traces = self._function, [0]

        def trace(serial: int, *arguments: Any) -> Any:
            # Without `self`: a reference cycle would keep dropped traces until Python's cycle collector runs.
            traces[0] += 1
            return function(*arguments)

        # A unique number becomes a constant of each trace. MLX identifies a trace by the address of the Python function
        # and by the constants. When a compiled function is freed, MLX drops only the traces of the thread that called
        # it last. In another thread a later function at the same address would run the old graph.
        self._serial = next(_serials)
        self._traces, self._compiled = traces, self._compile(trace)

    def __call__(self, *arguments: Any) -> Any:
        if not hasattr(_thread, "end"):
            _thread.end = _End() if threading.current_thread() is not threading.main_thread() else None
        if self._traces[0] > self._most:  # not >=: a call that needs no new trace would then trace anew each time
            self._begin()
        return self._compiled(self._serial, *arguments)


def is_evaluated(array: mx.array) -> bool:
    """Evaluates an array. Returns False if the array is part of a trace in progress and has no value."""
    try:
        mx.eval(array)
    except ValueError:  # MLX raises it inside a trace
        return False
    return True
