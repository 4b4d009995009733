"""What a person sees while something is measured, on stderr: a bar on a terminal, a line for each stage elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType

from rich import progress
from rich.console import Console


class Progress:
    """A context in which ``total`` stages of a part begin one after the other."""

    def __init__(self, part: str, total: int) -> None:
        console = Console(stderr=True)
        self.part, self.total, self.begun, self.terminal = part, total, 0, console.is_terminal
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[label]}"),
            console=console,
            transient=True,
            auto_refresh=False,  # a thread that draws would take part in every time
            disable=not self.terminal,
        )
        self._task = self._bar.add_task(part, total=total, label="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, label: str) -> None:
        self._bar.update(self._task, completed=self.begun, label=label, refresh=True)
        self.begun += 1
        if not self.terminal:
            print(f"{self.part} {self.begun}/{self.total}: {label}", file=sys.stderr, flush=True)
