"""The reports of a run: lines for a person, the log, and the dictionaries for callbacks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.tuner.callbacks import TrainingCallback

from ..distributed import Workers
from .history import History
from .log import RunLog
from .metrics import Report, StepReader, failures
from .options import called
from .screen import RunScreen
from .stopping import Asked
from .validation import no_targets


@dataclass(eq=False)
class Reporting:
    """Sends the results of steps and validations to the terminal, the ``log`` and the callback."""

    reader: StepReader
    screen: RunScreen
    callback: TrainingCallback
    workers: Workers
    asked: Asked
    max_seq_length: int
    most_traces: int | None  # that the batches of an epoch need, if their shapes are known
    log: RunLog | None = field(default=None, init=False)  # of the first worker, once the folder is ready
    history: History = field(default_factory=History, init=False)
    failures: int = field(default=0, init=False)  # steps in a row that were not finite
    sums: Report = field(default_factory=Report, init=False)
    unaccounted: list[dict[str, Any]] = field(default_factory=list, init=False)  # not yet summed over the workers
    told: bool = field(default=False, init=False)  # that no token is trained
    told_of_traces: bool = field(default=False, init=False)

    def line(self, text: str, style: str = "") -> None:
        self.screen.progress.line(text, style)

    def warn(self, message: str) -> None:
        self.line(f"warning: {message}", "yellow")

    def take(self, entries: list[dict[str, Any]]) -> None:
        """Accounts for the numbers of steps, and moves the progress bar by one step."""
        self._take(entries)
        self.workers.beat()
        self.screen.progress.advance()

    def drain(self) -> None:
        """Waits for the last step and accounts for everything."""
        self._take(self.reader.drain())
        self._account()

    def _take(self, entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            self.asked.count(entry.pop("votes") or 0.0)
            self.unaccounted.append(entry)
            # Workers exchange their losses for many steps at once. But a step that failed is accounted for soon; all
            # workers know it from the norm of the gradient.
            if not self.workers.many or not math.isfinite(entry["grad_norm"] or 0.0):
                self._account()

    def _account(self) -> None:
        entries, self.unaccounted = self.workers.mean_steps(self.unaccounted), []
        for entry in entries:
            self.sums.add(entry)
            self._record(entry)
            self.failures = failures(self.failures, entry)

    def _record(self, entry: dict[str, Any]) -> None:
        self.history.add(entry)
        if self.log is not None:
            self.log.write(entry)

    def report(self) -> None:
        """Reports the sums since the last report."""
        info = self.sums.close()
        self.history.report()
        self.screen.report(info)
        if not info["trained_tokens"] and not self.told:
            # Otherwise a run that teaches the model nothing looks like one that does.
            self.told = True
            self.warn(f"no token has been trained yet: {no_targets(self.max_seq_length)}")
        if not self.told_of_traces and (wrong := self._wrong_with_traces(info["traces"])):
            self.told_of_traces = True
            self.warn(wrong)
        self.callback.on_train_loss_report(info)

    def _wrong_with_traces(self, traces: int) -> str:
        if dropped := self.reader.step.traces["evicted"]:
            return (
                f"{traces} graphs were compiled, and {dropped} of them dropped, as there are more batch shapes than"
                f" {called('max_traces')}: raise it, or have fewer shapes with {called('bucket')}"
            )
        if self.most_traces is not None and traces > self.most_traces:
            return f"{traces} graphs were compiled, but the batches need at most {self.most_traces}: each takes time"
        return ""

    def validation(self, iteration: int, loss: float | None, seconds: float, best: bool) -> None:
        """Reports the validation ``loss`` before ``iteration``; None if no example has a token to predict.

        ``best`` says whether it is the lowest one so far.
        """
        if loss is None:
            self.line(f"iter {iteration:>5}  no validation loss: {no_targets(self.max_seq_length)}")
        else:
            self.screen.validation(iteration, loss, seconds, best)
        known = math.nan if loss is None else loss
        self._record({"iteration": iteration, "val_loss": known, "seconds": seconds})
        self.callback.on_val_loss_report({"iteration": iteration - 1, "val_loss": known, "val_time": seconds})

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON can hold it."""
        return {"report": self.sums.sums, "failures": self.failures}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`. Raises KeyError or TypeError for something else."""
        # A checkpoint of an earlier version has counted every iteration's loss.
        self.sums.sums = {"losses": state["report"]["iterations"], **state["report"]}
        self.failures = state["failures"]
