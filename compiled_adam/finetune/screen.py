"""What a person sees of a run: a box with the job, a table of reports and validations, and a bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from . import table
from .console import TrainingProgress
from .metrics import machine_memory


@dataclass(eq=False)
class RunScreen:
    """The screen of a run, above the bar of ``progress``. ``per_epoch`` is the number of batches, if it is known."""

    progress: TrainingProgress
    per_epoch: int | None
    _columns: tuple[str, ...] = field(default=(), init=False)  # of the heading that was printed last
    _loss: float = field(default=math.nan, init=False)  # the last one that was finite, in a report
    _skipped: int = field(default=0, init=False)

    def box(self, title: str, facts: Sequence[tuple[str, str]]) -> None:
        """Prints the job: a name and a value in each line."""
        if not self.progress.replaces:
            for name, value in facts:
                self.progress.line(f"{name:<10} {value}")
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in facts:
            grid.add_row(name, Text(value))
        self.progress.print(Panel(grid, title=Text(title, "bold magenta"), title_align="left", border_style="blue"))

    def resumed(self, iteration: int, loss: float | None, at: int | None) -> None:
        """The run goes on after ``iteration``, with the lowest validation ``loss`` so far ``at`` an iteration."""
        self.progress.completed = iteration
        if loss is not None:
            self.progress.best = f"best {table.loss(loss)} at {at}"

    def report(self, info: dict[str, Any]) -> None:
        """Prints a training report: the dictionary that callbacks get."""
        iteration, loss = info["iteration"], info["train_loss"]
        if not self.progress.replaces:
            left = self.progress.seconds_left()
            self.progress.line(table.plain(info, self._epoch(iteration), machine_memory() / 1e9, left))
        else:
            self.progress.print(table.row(self._cells(info), self._heading()))
        self._loss = loss if math.isfinite(loss) else self._loss
        if info["skipped_steps"] > self._skipped:
            self._skipped = info["skipped_steps"]
            self.progress.line(
                f"iter {iteration:>5}  {self._skipped} updates skipped so far: a gradient was not finite", "yellow"
            )

    def validation(self, iteration: int, loss: float, seconds: float, best: bool) -> None:
        """Prints a validation loss; ``best`` says whether there was no lower one."""
        if best:
            self.progress.best = f"best {table.loss(loss)} at {iteration}"
        if not self.progress.replaces:
            mark = "  best" if best else ""
            self.progress.line(
                f"iter {iteration:>5}  validation loss {table.loss(loss)}{mark}  {table.duration(seconds)}"
            )
            return
        cells = {
            "iter": Text(str(iteration)),
            "epoch": self._epoch_cell(iteration),
            "loss": Text(f"{table.loss(loss)}  "),
        }
        columns = [name for name in self._heading() if name in cells]
        row = table.row(cells, columns).append("  val")
        row.stylize("bold magenta")
        row.append("  best" if best else "", "bold green")
        row.append(f"  {table.duration(seconds)}", "dim")
        self.progress.print(row)

    def _heading(self) -> tuple[str, ...]:
        """The columns of the next row. They are named where they begin, and again if the terminal is wider now."""
        columns = table.fitting(self.progress.width, () if self.per_epoch else ("epoch",))
        if columns != self._columns:
            self.progress.print(table.heading(columns))
        self._columns = columns
        return columns

    def _cells(self, info: dict[str, Any]) -> dict[str, Text]:
        peak, machine, norm = info["peak_memory"], machine_memory() / 1e9, info["grad_norm"]
        trained = info["tokens_per_second"] > 0
        return {
            "iter": Text(str(info["iteration"]), "dim"),
            "epoch": self._epoch_cell(info["iteration"]),
            "loss": self._trend(info["train_loss"]) if trained else Text("no targets", "yellow"),
            "lr": Text(table.rate(info["learning_rate"])),
            "norm": Text(table.norm(norm), "" if norm is None or math.isfinite(norm) else "bold red"),
            "tokens/s": Text(f"{info['tokens_per_second']:,.0f}", "bold"),
            "tokens": Text(table.count(info["trained_tokens"]), "dim"),
            "memory": Text(table.memory(peak, machine), "yellow" if peak > 0.9 * machine else ""),
            "left": Text(table.left(self.progress.seconds_left())),
        }

    def _trend(self, loss: float) -> Text:
        """The loss, with an arrow: down is better than in the last report, up is worse."""
        down, up = "v^" if self.progress.console.options.ascii_only else "▼▲"
        mark, style = " ", "bold"
        if not math.isfinite(loss):
            style = "bold red"
        elif loss < self._loss:
            mark, style = down, "bold green"
        elif loss > self._loss:
            mark, style = up, "bold yellow"
        return Text(f"{table.loss(loss)} {mark}", style)

    def _epoch(self, iteration: int) -> float | None:
        return iteration / self.per_epoch if self.per_epoch else None

    def _epoch_cell(self, iteration: int) -> Text:
        epoch = self._epoch(iteration)
        return Text("" if epoch is None else f"{epoch:.2f}", "dim")
