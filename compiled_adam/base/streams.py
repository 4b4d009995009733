"""Standard output and error streams that never end a run, even if closed, full, without a reader, or ASCII-only."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast


class Lenient:
    """A wrapper of the text stream ``stream`` that never raises when writing: text that cannot be written is dropped.

    Characters that the encoding lacks are written as escapes. All other attributes (``encoding``, ``isatty``,
    ``fileno``, ...) are those of ``stream``.
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
        # The buffer still has the unwritten text: Python would try again at exit, and exit with code 120.
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
        if not isinstance(error, BrokenPipeError) and self._stream is sys.__stdout__:
            say(f"\nstandard output cannot be written any more ({error}); going on without it\n")


def lenient(stream: IO[str] | None) -> IO[str]:
    """Wraps a stream in `Lenient`, once. None (Python's value for a closed stream) becomes a stream to nowhere."""
    if stream is None:
        return open(os.devnull, "w")  # stays open until the process ends
    return stream if isinstance(stream, Lenient) else cast(IO[str], Lenient(stream))


@contextmanager
def lenient_streams() -> Iterator[None]:
    """Makes ``sys.stdout`` and ``sys.stderr`` lenient within the context."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The number is free: the next opened file would get it, and then all printed text would go to that file.
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
    """Writes to standard error directly, which is safe in signal handlers. Does nothing without standard error."""
    if sys.__stderr__ is not None:  # otherwise descriptor 2 may be another file
        with suppress(OSError):
            os.write(2, text.encode())
