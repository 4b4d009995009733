"""A thread that ends this process when other workers are lost. No other way can interrupt a wait inside MLX.

A worker that dies closes the connections. Mostly MLX then raises an error in the neighbours, but sometimes they wait
for ever (see `ring`). They also wait for ever if a worker is frozen or has lost network or power.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import ring

GRACE = 15.0  # seconds that MLX has to raise an error after a connection is closed
PATIENCE = 10  # times the timeout: the limit for starting, loading and saving, which may take one worker long
SLOWER = 5  # times the longest step so far: the limit for a step, if longer than the timeout


class Watchdog:
    """A context that ends the process with exit code 1 and a message if `beat` is not called in time.

    The limit is ``timeout`` seconds, or five times the longest time between two beats so far, if that is longer. Before
    the first beat and inside `patient` the limit is ten times ``timeout``. If a connection of the ring backend is
    closed, the limit is fifteen seconds. Inside `busy` there is no limit.
    """

    def __init__(self, timeout: float, explain: Callable[[], str]) -> None:
        self._timeout, self._explain = timeout, explain
        self._ended = threading.Event()
        self._last = time.monotonic()
        self._longest: float | None = None  # seconds between two beats; None before the first beat
        self._patient = self._busy = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        self._connections = ring.Connections()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._connections.close()

    def beat(self) -> None:
        """Tells the watchdog that an operation that needs the other workers has finished."""
        now = time.monotonic()
        self._longest = 0.0 if self._longest is None else max(self._longest, now - self._last)
        self._last = now

    @contextmanager
    def patient(self) -> Iterator[None]:
        """A context in which other workers may need long. It does not count as a step."""
        self._patient += 1
        self._last = time.monotonic()
        try:
            yield
        finally:
            self._last = time.monotonic()
            self._patient -= 1

    @contextmanager
    def busy(self) -> Iterator[None]:
        """A context in which this worker does not wait for other workers."""
        self._busy += 1
        try:
            yield
        finally:
            self._last = time.monotonic()
            self._busy -= 1

    def limit(self) -> float:
        """The present limit in seconds for the time since the last beat."""
        if self._patient or self._longest is None:
            return PATIENCE * self._timeout
        return max(self._timeout, SLOWER * self._longest)

    def _watch(self) -> None:
        interval, looked = min(1.0, self._timeout / 4), time.monotonic()
        while not self._ended.wait(interval):
            # While all of this process stood still, as after Ctrl-Z, it waited for nobody.
            before, looked = looked, time.monotonic()
            if (still := looked - before) > 10 * interval:
                self._last = min(self._last + still, looked)
            if (why := self.why_end()) is not None:
                self._end(why)

    def why_end(self) -> str | None:
        """The reason to end the process now. None if there is none."""
        silent = time.monotonic() - self._last
        if self._busy:
            return None
        if silent > self.limit():
            return f"no answer from the other workers for {silent:.0f} s"
        if silent > GRACE and self._connections.is_cut():
            return "another worker has ended (its connection is closed)"
        return None

    def _end(self, why: str) -> None:
        os.write(2, f"compiled-adam: {why}; {self._explain()}\n".encode())
        os._exit(1)  # the main thread is inside MLX, where no exception can reach it
