"""Standard output and errors that never end a run: closed, full, without a reader, or for ASCII only."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any


class Lenient:
    """The text stream ``stream``, but writing to it never raises: what cannot be written is left out.

    Characters that its encoding does not have are written as escapes. Everything else (``encoding``, ``isatty``,
    ``fileno``, ...) is the stream's own.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._works = stream, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if self._works:
            try:
                try:
                    self._stream.write(text)
                except UnicodeEncodeError:
                    encoding = str(self.encoding)
                    self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:  # ValueError: it was closed
                self._give_up(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._works:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._works = False
        # Its buffer still has what could not be written: Python would try again at the end, and exit with 120.
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
        if not isinstance(error, BrokenPipeError) and self._stream is sys.__stdout__:
            say(f"\nstandard output cannot be written any more ({error}); going on without it\n")


def lenient(stream: IO[str] | None) -> IO[str]:
    """`Lenient` of a stream, once; for None, which is what Python makes of a closed one, a stream to nowhere."""
    if stream is None:
        return open(os.devnull, "w")  # open as long as the process
    return stream if isinstance(stream, Lenient) else Lenient(stream)  # type: ignore[return-value]


@contextmanager
def lenient_streams() -> Iterator[None]:
    """Makes ``sys.stdout`` and ``sys.stderr`` lenient, for whoever prints."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The next file that is opened would get this number, and everything that is printed to it.
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = lenient(sys.stdout), lenient(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def say(text: str) -> None:
    """Writes to standard error at once, as signal handlers may; nothing, if there is none."""
    if sys.__stderr__ is not None:  # otherwise 2 may be a file of somebody's
        with suppress(OSError):
            os.write(2, text.encode())
