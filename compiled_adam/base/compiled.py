"""``mx.compile`` that forgets: MLX itself keeps every trace of a function for ever."""

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
    """Forgets the traces of a thread when it ends.

    MLX keeps them for each thread, and drops them after Python has let go of it. If the process ends at that moment,
    Python ends the thread while it frees what a trace refers to, and that aborts the process.
    """

    def __del__(self, clear: Callable[[], None] = mx.clear_streams) -> None:
        clear()


class Compiled:
    """A compiled ``function`` that is begun anew when it has been traced more than ``most`` times.

    Another shape, dtype or Python number is another trace. An optimizer whose numbers change at every step would
    otherwise fill the memory. ``draws``: whether the function uses MLX's global random state.
    """

    def __init__(self, function: Callable[..., Any], most: int, draws: bool = False) -> None:
        self._function = function
        self._most = max(most, 2)  # with 1, every call would come after the last trace
        self._compile = random_state.compiled if draws else mx.compile
        self._begin()

    def _begin(self) -> None:
        function, traces = self._function, [0]

        def trace(serial: int, *arguments: Any) -> Any:
            # Without `self`: in a circle of references what is evicted would stay until Python looks for circles.
            traces[0] += 1
            return function(*arguments)

        # A number of its own, which is a constant of each trace. MLX knows a trace by the address of its Python
        # function, and by its constants. When a compiled function goes, MLX forgets only the traces of the thread that
        # called it last: in another thread, a later function at the same address would run the old graph.
        self._serial = next(_serials)
        self._traces, self._compiled = traces, self._compile(trace)

    def __call__(self, *arguments: Any) -> Any:
        if not hasattr(_thread, "end"):
            _thread.end = _End() if threading.current_thread() is not threading.main_thread() else None
        if self._traces[0] > self._most:  # not at ``most``: one trace that serves every call would be made at each
            self._begin()
        return self._compiled(self._serial, *arguments)


def is_evaluated(array: mx.array) -> bool:
    """Evaluates an array; False if it has no value, because it depends on what is being traced."""
    try:
        mx.eval(array)
    except ValueError:  # MLX's word for that
        return False
    return True
