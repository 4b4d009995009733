"""The output for a person: lines, and below them a bar on a terminal; in a notebook one output for all of it."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..base import lenient
from .table import duration, left

_LONG = 1.0  # seconds after which it is said how long something took
# In a notebook:
_HEAD, _TAIL = 20, 180  # lines that stay: the first and the last, so that an output of a long run is not slow
_SELDOM = 0.5  # seconds between two updates
_PAGE = '<pre style="white-space:pre;overflow-x:auto;line-height:1.25">{code}</pre>'


class RunConsole(Console):
    """A console that never ends a run: its reader may leave (``| head``), the disk may be full."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__(file=lenient(sys.stdout), quiet=quiet, highlight=False)

    @property
    def encoding(self) -> str:
        # Python writes UTF-8 in the locale C, too; but who has asked for that locale may have a terminal without it.
        asked = os.environ.get("LC_ALL") or os.environ.get("LANG")
        return "ascii" if asked in ("C", "POSIX") else super().encoding

    @property
    def replaces(self) -> bool:
        """Whether a line on the screen can be replaced by another one."""
        return self.is_terminal and not self.is_dumb_terminal and not self.quiet


@contextmanager
def stage(what: str, clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
    """Says ``what`` is being done before there is a bar, and how long it took if that was more than a second.

    Not a bar, because packages draw their own bars meanwhile, for downloads.
    """
    console, start = RunConsole(), clock()
    if console.replaces:  # one line at most, which is removed again
        console.print(Text(what, "dim"), end="", no_wrap=True, overflow="ellipsis")
    else:
        console.print(what, markup=False, soft_wrap=True)
    try:
        yield
    finally:
        if console.replaces:
            console.file.write("\r\x1b[2K")
            console.file.flush()
    if (seconds := clock() - start) >= _LONG:
        console.print(Text(f"{what}: {duration(seconds)}", "dim"), soft_wrap=True)


class _NotebookOutput:
    """One output of a cell for all lines, and a bar below them while the run goes on."""

    width = 100

    def __init__(self) -> None:
        self._lines: list[RenderableType] = []
        self._handle: Any = None
        self._shown = 0.0

    def add(self, line: RenderableType) -> None:
        self._lines.append(line)
        del self._lines[_HEAD:-_TAIL]

    def show(self, bar: RenderableType = "", seldom: bool = False) -> None:
        """Shows lines and bar in the place of what was there; with ``seldom`` not if that was done a moment ago."""
        from IPython.display import display  # it is there, because this is a notebook

        now = time.monotonic()
        if seldom and now - self._shown < _SELDOM:
            return
        self._shown = now
        # As on a terminal: in a notebook rich shows each line as an output of its own.
        console = Console(
            file=io.StringIO(), record=True, width=self.width, force_terminal=True, force_jupyter=False, highlight=False
        )
        console.print(Group(*self._lines, *([bar] if bar else [])))
        text = console.export_text(clear=False)
        bundle = {"text/plain": text, "text/html": console.export_html(inline_styles=True, code_format=_PAGE)}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


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
        self.console = RunConsole(quiet)
        self._output = _NotebookOutput() if self.console.is_jupyter and not quiet else None
        self._live = Live(console=self.console, transient=True, get_renderable=self._bar)

    def __enter__(self) -> TrainingProgress:
        if self.console.replaces:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        if self._output is not None:
            self._output.show()

    @property
    def replaces(self) -> bool:
        """Whether there is a bar, so that a table is better than lines with a word beside each number."""
        return self.console.replaces or self._output is not None

    @property
    def width(self) -> int:
        """The characters of a line. A terminal may have another number of them when its window has been resized."""
        return (self.console.width if self._output is None else self._output.width) - 1

    def advance(self) -> None:
        self.completed += 1
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
