"""The output of a run for a person: a progress bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..base import lenient


class TrainingProgress:
    """A context with a progress bar of ``total`` steps, labelled ``what``, and lines that stay above the bar."""

    def __init__(self, total: int, quiet: bool = False, what: str = "train") -> None:
        # A run goes on if its reader leaves (``| head``), or the disk is full.
        self._console = Console(file=lenient(sys.stdout), quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=quiet or not self._console.is_terminal,
        )
        self._training = self._bar.add_task(what, total=total, status="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, steps: int = 1) -> None:
        self._bar.advance(self._training, steps)

    def report(self, info: dict[str, Any]) -> None:
        """Prints a training report: the dictionary that callbacks get."""
        rate, norm = info["learning_rate"], info["grad_norm"]
        loss = f"loss {info['train_loss']:.4f}" if info["tokens_per_second"] > 0 else "no targets"
        self.line(
            f"iter {info['iteration']:>5}  {loss}"
            f"  lr {'-' if rate is None else f'{rate:.2e}'}  norm {'-' if norm is None else f'{norm:.3f}'}"
            f"  {info['tokens_per_second']:,.0f} tokens/s  peak {info['peak_memory']:.2f} GB  traces {info['traces']}"
        )
        self._bar.update(self._training, status=loss)

    def line(self, text: str) -> None:
        # Without soft_wrap a pipe, which has no width, would get lines broken at 80 columns.
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
