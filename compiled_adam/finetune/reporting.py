"""What a run tells: lines for a person, the log, and the dictionaries for callbacks."""

from __future__ import annotations

import math
from typing import Any

from mlx_lm.tuner.callbacks import TrainingCallback

from ..distributed import Workers
from ..step import StepResult, TrainStep
from .console import TrainingProgress
from .log import RunLog
from .metrics import Report, StepReader, failures
from .stopping import Asked
from .validation import no_targets


class Reporting:
    """Takes the results of steps and validations, and tells them to the terminal, the ``log`` and the callback.

    ``failures`` is the number of steps in a row that were not finite.
    """

    def __init__(
        self,
        step: TrainStep,
        progress: TrainingProgress,
        callback: TrainingCallback | None,
        workers: Workers,
        asked: Asked,
        max_seq_length: int,
    ) -> None:
        self.progress, self.callback = progress, callback or TrainingCallback()
        self.log: RunLog | None = None  # of the first worker, once the folder is ready
        self.failures = 0
        self._reader, self._report = StepReader(step), Report()
        self._workers, self._asked, self._max_seq_length = workers, asked, max_seq_length
        self._unaccounted: list[dict[str, Any]] = []  # steps that are not yet summed over the workers
        self._told = False  # that no token is trained

    def line(self, text: str) -> None:
        self.progress.line(text)

    def warn(self, message: str) -> None:
        self.line(f"warning: {message}")

    def put(self, iteration: int, result: StepResult) -> list[dict[str, Any]]:
        """A step was started; returns the numbers of the step before it, for `take`."""
        return self._reader.put(iteration, result)

    def take(self, entries: list[dict[str, Any]]) -> None:
        """Accounts for the numbers of steps, and moves the progress bar by one step."""
        self._take(entries)
        self._workers.beat()
        self.progress.advance()

    def drain(self) -> None:
        """Waits for the last step and accounts for everything."""
        self._take(self._reader.drain())
        self._account()

    def restart_clock(self) -> None:
        """After a validation or a save, whose time is not a step's."""
        self._reader.restart_clock()

    def _take(self, entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            self._asked.count(entry.pop("votes", 0.0))
            self._unaccounted.append(entry)
            # With other workers, whose losses are not known here, that is done for many steps at once; but soon for
            # those that fail, which the gradient's norm says to all alike.
            if not self._workers.many or not math.isfinite(entry["grad_norm"] or 0.0):
                self._account()

    def _account(self) -> None:
        entries, self._unaccounted = self._workers.mean_steps(self._unaccounted), []
        for entry in entries:
            self._report.add(entry)
            if self.log is not None:
                self.log.write(entry)
            self.failures = failures(self.failures, entry)

    def report(self) -> None:
        """Tells what was summed since the last report."""
        info = self._report.close()
        self.progress.report(info)
        if not info["trained_tokens"] and not self._told:
            # Otherwise a run that teaches the model nothing looks like one that does.
            self._told = True
            self.warn(f"no token has been trained yet: {no_targets(self._max_seq_length)}")
        self.callback.on_train_loss_report(info)

    def validation(self, iteration: int, loss: float | None, seconds: float) -> None:
        """Tells the validation ``loss`` before ``iteration``; None if no example has a token to predict."""
        said = f"no validation loss: {no_targets(self._max_seq_length)}" if loss is None else ""
        self.line(f"iter {iteration:>5}  {said or f'validation loss {loss:.4f}'}")
        known = math.nan if loss is None else loss
        if self.log is not None:
            self.log.write({"iteration": iteration, "val_loss": known, "seconds": seconds})
        self.callback.on_val_loss_report({"iteration": iteration - 1, "val_loss": known, "val_time": seconds})

    def state(self) -> dict[str, Any]:
        """What a checkpoint has of this, as JSON can hold it."""
        return {"report": self._report.sums, "failures": self.failures}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`. Raises KeyError or TypeError for something else."""
        # A checkpoint of an earlier version has counted every iteration's loss.
        self._report.sums = {"losses": state["report"]["iterations"], **state["report"]}
        self.failures = state["failures"]
