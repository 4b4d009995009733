"""A thread that ends this process when another worker is silent: a wait inside MLX cannot be interrupted otherwise.

A worker that dies closes its connections, and MLX raises an error at its neighbours. One that is frozen, or whose
network or power is gone, does not: then the others would wait for ever.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 10  # times the timeout: for starting, loading and saving, which may take one worker long
SLOWER = 5  # times the longest step so far


class Watchdog:
    """A context whose process ends with exit code 1 and a message if `beat` is not called in time.

    In time means: within ``timeout`` seconds, or five times the longest time between two beats so far if that is
    longer; before the first beat and while `patient`, within ten times ``timeout``.
    """

    def __init__(self, timeout: float, explain: Callable[[], str]) -> None:
        self._timeout, self._explain = timeout, explain
        self._ended = threading.Event()
        self._last, self._longest = time.monotonic(), 0.0
        self._beaten = False
        self._patient = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def beat(self) -> None:
        """Something was finished that needed the other workers."""
        now = time.monotonic()
        if self._beaten:
            self._longest = max(self._longest, now - self._last)
        self._last, self._beaten = now, True

    @contextmanager
    def patient(self) -> Iterator[None]:
        """A time in which others may be busy with something long; it does not count as a step."""
        self._patient += 1
        self._last = time.monotonic()
        try:
            yield
        finally:
            self._last = time.monotonic()
            self._patient -= 1

    def limit(self) -> float:
        """Seconds after which silence is too long, now."""
        if self._patient or not self._beaten:
            return PATIENCE * self._timeout
        return max(self._timeout, SLOWER * self._longest)

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._timeout / 4)):
            silent, limit = time.monotonic() - self._last, self.limit()
            if silent > limit:
                text = f"compiled-adam: no answer from the other workers for {silent:.0f} s; {self._explain()}\n"
                os.write(2, text.encode())
                os._exit(1)  # the main thread is inside MLX, where no exception can reach it
