"""The history of a run: a row for every report and every validation, without mlx-lm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base import InputError
from ..schedulers import picture
from . import log
from .metrics import Report
from .names import LOG
from .packages import needed

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


class History:
    """What a run has reported: the result of `train`.

    ``entries`` lists a dictionary for every training report and every validation, in the order of the run, with the
    names of ``log.jsonl``. A report has ``iteration`` (the last one of the report), ``loss`` (the mean over the
    iterations since the last report), the sums ``tokens`` and ``seconds``, and ``grad_norm``, ``learning_rate``,
    ``skipped``, ``traces`` and ``memory`` (peak, bytes) of the last iteration. A validation has ``iteration`` (before
    which it was made), ``val_loss`` and ``seconds``. A number that is not finite is None.

    >>> History([{"iteration": 1, "val_loss": 2.5}, {"iteration": 10, "loss": 2.0}, {"iteration": 10, "val_loss": 1.5}])
    History(10 iterations, loss 2.0000, best validation loss 1.5000 at 10)
    """

    def __init__(self, entries: Iterable[dict[str, Any]] = ()) -> None:
        self.entries = list(entries)
        self._steps = Report()  # since the last row of steps

    @classmethod
    def read(cls, log_file: str | Path, every: int = 10) -> History:
        """The history of a run from its log, also while the run goes on.

        Args:
            log_file: ``log.jsonl``, or the folder of the adapters that has it.
            every: how many iterations are one report, at least 1. Default 10.

        Raises:
            ValueError: there is no log, it is damaged, or ``every`` is out of range.
        """
        if type(every) is not int or every < 1:
            raise InputError(f"every is {every!r}; it must be a whole number of at least 1")
        file = Path(log_file) / LOG if Path(log_file).is_dir() else Path(log_file)
        if not file.is_file():
            raise InputError(f"{file} does not exist; `train` writes a log with log=True, `compiled-adam lora` always")
        history = cls()
        history.follow(log.read(file), every)
        history.report()
        return history

    @property
    def losses(self) -> list[tuple[int, float]]:
        """``(iteration, loss)`` of every training report. A loss that is not finite is nan."""
        return self._values("loss")

    @property
    def val_losses(self) -> list[tuple[int, float]]:
        """``(iteration, loss)`` of every validation. It was made before the update of the iteration."""
        return self._values("val_loss")

    @property
    def best(self) -> tuple[int, float] | None:
        """``(iteration, loss)`` of the first validation with the lowest loss. None without a validation."""
        finite = [found for found in self.val_losses if math.isfinite(found[1])]
        return min(finite, key=lambda found: found[1]) if finite else None

    def _values(self, name: str) -> list[tuple[int, float]]:
        rows = [row for row in self.entries if name in row]
        return [(row["iteration"], math.nan if row[name] is None else row[name]) for row in rows]

    def plot(self) -> Figure:
        """A matplotlib figure of both losses; the best validation is marked. A notebook shows it.

        Raises ImportError if matplotlib is missing. The message says how to install it.
        """
        figure = picture.canvas()
        axes = figure.subplots()
        for label, values, style in (("training", self.losses, "-"), ("validation", self.val_losses, "o-")):
            if values:
                axes.plot(*zip(*values, strict=True), style, label=label, markersize=4)
        if self.best is not None:
            iteration, loss = self.best
            axes.plot(iteration, loss, "*", color="black", markersize=10, label=f"best: {loss:.4f} at {iteration}")
        axes.set_xlabel("iteration")
        axes.set_ylabel("loss")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
        return figure

    def to_pandas(self) -> DataFrame:
        """``entries`` as a data frame of pandas, a row for each.

        Raises ImportError if pandas is missing. The message says how to install it.
        """
        with needed("to_pandas", "pandas", "notebook"):
            from pandas import DataFrame
        return DataFrame(self.entries)

    def __repr__(self) -> str:
        losses = [loss for _, loss in self.losses]
        parts = [f"{max((row['iteration'] for row in self.entries), default=0)} iterations"]
        if losses:
            parts.append(f"loss {' -> '.join(f'{loss:.4f}' for loss in (losses[0], *losses[1:][-1:]))}")
        if self.best is not None:
            parts.append(f"best validation loss {self.best[1]:.4f} at {self.best[0]}")
        return f"History({', '.join(parts)})"

    # While the run goes on.

    def follow(self, lines: Iterable[dict[str, Any]], every: int) -> None:
        """Adds the lines of a log, with a report at every multiple of ``every``."""
        for line in lines:
            self.add(line)
            if "val_loss" not in line and line["iteration"] % every == 0:
                self.report()

    def add(self, line: dict[str, Any]) -> None:
        """Adds a line of the log: a validation, or a step, which is summed until the next `report`."""
        if "val_loss" in line:
            self.entries.append(log.finite(line))
        else:
            self._steps.add(line)

    def report(self) -> None:
        """Makes a row of the steps since the last report, if there are any."""
        steps, self._steps = self._steps, Report()
        if steps.last:
            sums = {name: steps.sums[name] for name in ("tokens", "seconds", "grad_norm")}
            self.entries.append(log.finite({**steps.last, "loss": steps.loss, **sums}))
