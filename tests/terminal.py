"""A terminal for tests: what this process prints goes to a pseudo terminal, which pyte draws."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios
import threading
from collections.abc import Iterator

import pyte
import pytest


class Terminal:
    """The screen of a terminal. ``columns`` and ``rows`` are those of its window."""

    def __init__(self, columns: int, rows: int) -> None:
        self._ours, self.theirs = pty.openpty()
        self._screen = pyte.HistoryScreen(columns, rows, history=1000)
        self._stream = pyte.ByteStream(self._screen)
        self.raw, self._marks = b"", 0
        self._read = threading.Condition()
        self._resize(columns, rows)
        self._thread = threading.Thread(target=self._draw, daemon=True)
        self._thread.start()

    def _resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _draw(self) -> None:
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while some := os.read(self._ours, 65536):
                with self._read:
                    self.raw += some
                    self._stream.feed(some)
                    self._read.notify_all()

    def _drawn(self) -> None:
        """Waits until all that was printed has been drawn."""
        self._marks += 1
        mark = f"drawn-{self._marks}"
        title = f"\x1b]2;{mark}\x07".encode()  # of the window
        os.write(self.theirs, title)
        with self._read:
            assert self._read.wait_for(lambda: self._screen.title == mark, timeout=60)
            self.raw = self.raw.replace(title, b"")

    def resize(self, columns: int) -> None:
        """Another width, when all that was printed for the old one has been drawn."""
        sys.stdout.flush()
        self._drawn()
        with self._read:
            self._screen.resize(self._screen.lines, columns)
        self._resize(columns, self._screen.lines)

    def close(self) -> list[str]:
        """The lines that are on the screen in the end, and those that it has scrolled away."""
        self._drawn()  # else Linux may lose what is not read yet: on a busy machine one closing of thousands did
        os.close(self.theirs)
        self._thread.join(timeout=60)
        assert not self._thread.is_alive()
        os.close(self._ours)
        gone = ["".join(line[i].data for i in range(self._screen.columns)) for line in self._screen.history.top]
        lines = [line.rstrip() for line in [*gone, *self._screen.display]]
        while lines and not lines[-1]:
            lines.pop()
        return lines


@contextlib.contextmanager
def terminal(
    monkeypatch: pytest.MonkeyPatch, columns: int, rows: int = 30, encoding: str = "utf-8", **environment: str
) -> Iterator[Terminal]:
    """Standard input and output are a terminal in this context; it is closed by `Terminal.close`, after the context."""
    with monkeypatch.context() as patch:
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "LC_ALL", "LANG"):
            patch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm-256color", **environment}.items():
            patch.setenv(name, value)
        shown = Terminal(columns, rows)
        saved = os.dup(0)
        os.dup2(shown.theirs, 0)  # where rich looks for the size of the window
        with open(os.dup(shown.theirs), "w", encoding=encoding) as stream:
            patch.setattr(sys, "stdout", stream)
            try:
                yield shown
            finally:
                os.dup2(saved, 0)
                os.close(saved)
