"""The output for a person: lines, and below them a bar on a terminal; in a notebook one output for all of it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..base import lenient
from .notebook import Output
from .table import duration, left

_LONG = 1.0  # seconds after which it is said how long something took


class _Console(Console):
    @property
    def encoding(self) -> str:
        # Python writes UTF-8 in the locale C, too; but who has asked for that locale may have a terminal without it.
        asked = os.environ.get("LC_ALL") or os.environ.get("LANG")
        return "ascii" if asked in ("C", "POSIX") else super().encoding


def make_console(quiet: bool = False) -> Console:
    """A console that never ends a run: its reader may leave (``| head``), the disk may be full."""
    return _Console(file=lenient(sys.stdout), quiet=quiet, highlight=False)


def is_live(console: Console) -> bool:
    """Whether a line on the screen can be replaced by another one."""
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def stage(what: str, clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
    """Says ``what`` is being done before there is a bar, and how long it took if that was more than a second.

    Not a bar, because packages draw their own bars meanwhile, for downloads.
    """
    console, start = make_console(), clock()
    live = is_live(console)
    if live:  # one line at most, which is removed again
        console.print(Text(what, "dim"), end="", no_wrap=True, overflow="ellipsis")
    else:
        console.print(what, markup=False, soft_wrap=True)
    try:
        yield
    finally:
        if live:
            console.file.write("\r\x1b[2K")
            console.file.flush()
    if (seconds := clock() - start) >= _LONG:
        console.print(Text(f"{what}: {duration(seconds)}", "dim"), soft_wrap=True)


class TrainingProgress:
    """A context with a bar of ``total`` steps, labelled ``what``, and lines that stay above the bar.

    ``doing`` and ``best`` are texts in the bar.
    """

    def __init__(
        self, total: int, quiet: bool = False, what: str = "train", clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.total, self.completed, self.doing, self.best = total, 0, "", ""
        self._what, self._clock = what, clock
        self._first: tuple[float, int] | None = None  # when a step was first finished, and how many there were
        self.console = make_console(quiet)
        self._output = Output() if self.console.is_jupyter and not quiet else None
        self._on_terminal = is_live(self.console) and not quiet
        self._live = Live(console=self.console, transient=True, get_renderable=self._bar)

    def __enter__(self) -> TrainingProgress:
        if self._on_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()
        if self._output is not None:
            self._output.show()

    @property
    def replaces(self) -> bool:
        """Whether there is a bar, so that a table is better than lines with a word beside each number."""
        return self._on_terminal or self._output is not None

    @property
    def width(self) -> int:
        """The characters of a line. A terminal may have another number of them when its window has been resized."""
        return (self.console.width if self._output is None else self._output.width) - 1

    def advance(self, steps: int = 1) -> None:
        self.completed += steps
        if self._first is None:
            self._first = self._clock(), self.completed
        if self._output is not None:
            self._output.show(self._bar(), seldom=True)

    def seconds_left(self) -> float | None:
        """From the pace since the first step, which was slower, because kernels were compiled in it."""
        if self._first is None or self.completed == self._first[1]:
            return None
        start, before = self._first
        return (self._clock() - start) / (self.completed - before) * (self.total - self.completed)

    @contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Says in the bar ``what`` is being done; a line says how long it took if that was more than a second."""
        self.doing, start = what, self._clock()
        try:
            yield
        finally:
            self.doing = ""
        if (seconds := self._clock() - start) >= _LONG:
            self.line(f"{what}: {duration(seconds)}", "dim")

    def line(self, text: str, style: str = "") -> None:
        self.print(Text(text, style, overflow="fold"))

    def print(self, what: RenderableType) -> None:
        if self._output is not None:
            self._output.add(what)
            self._output.show(self._bar(), seldom=True)
        else:
            # Without soft_wrap a pipe, which has no width, would get lines broken at 80 columns.
            self.console.print(what, soft_wrap=not self.console.is_terminal)

    def _bar(self) -> RenderableType:
        """One line, never more: what does not fit is left out."""
        text, least = f"{self.completed}/{self.total}", len(self._what) + 8
        seconds = self.seconds_left()
        for part in (self.doing, "" if seconds is None else f"{left(seconds)} left", self.best):
            if part and least + len(text) + 2 + len(part) <= self.width:
                text += f"  {part}"
        bar = ProgressBar(self.total, self.completed, min(24, max(1, self.width - len(self._what) - len(text) - 2)))
        grid = Table.grid(padding=(0, 1))
        grid.add_row(Text(self._what, "bold"), bar, Text(text, no_wrap=True))
        return grid
