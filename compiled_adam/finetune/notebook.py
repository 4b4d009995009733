"""The output of a cell in a notebook, which is replaced as a run goes on."""

from __future__ import annotations

import io
import time
from typing import Any

from rich.console import Console, Group, RenderableType

_HEAD, _TAIL = 20, 180  # lines that stay: the first and the last, so that an output of a long run is not slow
_SELDOM = 0.5  # seconds between two updates
_PAGE = '<pre style="white-space:pre;overflow-x:auto;line-height:1.25">{code}</pre>'


class Output:
    """One output for all lines, and a bar below them while the run goes on."""

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
