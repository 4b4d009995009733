"""Contenders in processes of their own, as users have them: none finds the memory or the threads of another.

In one process with stock MLX, a step of ours takes up to a third longer: the C library gives it memory that stock has
cut into small pieces.
"""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.connection import Connection
from typing import Any

from .contenders import CONTENDERS, Unavailable
from .measure import Here, Row
from .workloads import DTYPES, Shapes, arrays


def here(name: str, shapes: Shapes, dtype: str) -> Here:
    """The contender of this name in this process. Equal arguments give equal parameters and gradients."""
    parameters = arrays(shapes, DTYPES[dtype], 0.02, seed=0)
    return Here(CONTENDERS[name].make, parameters, arrays(shapes, DTYPES[dtype], 1e-3, seed=1))


class Apart:
    """`here`, in a new process. Raises Unavailable as `here` does."""

    def __init__(self, name: str, shapes: Shapes, dtype: str) -> None:
        context = multiprocessing.get_context("spawn")  # MLX's threads do not survive a fork
        self._connection, its = context.Pipe()
        self._process = context.Process(target=_serve, args=(its, name, shapes, dtype), daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C ends this process, and `close` that
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        its.close()
        try:
            figures, unavailable = self._connection.recv()
        except EOFError:
            self.close()
            raise RuntimeError(
                f"the process of {name} has ended: see its error above, or there is too little memory"
            ) from None
        except BaseException:
            self.close()
            raise
        if unavailable is not None:
            self.close()
            raise Unavailable(unavailable)
        self.figures: Row = figures

    def time(self) -> float:
        """The seconds of an update."""
        return self._asked("time")

    def traces(self) -> int | None:
        return self._asked("traces")

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _asked(self, what: str) -> Any:
        self._connection.send(what)
        return self._connection.recv()


def _serve(connection: Connection, name: str, shapes: Shapes, dtype: str) -> None:
    try:
        runner = here(name, shapes, dtype)
    except Unavailable as error:
        connection.send((None, str(error)))
        return
    connection.send((runner.figures, None))
    while True:
        try:
            what = connection.recv()
        except EOFError:  # the process that measures has ended
            return
        connection.send(getattr(runner, what)())
