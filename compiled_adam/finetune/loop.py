"""The fine-tuning loop: it iterates, and saves everything at its end."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tuner.trainer import TrainingArgs

from ..base import InputError, TrainingStopped, is_lost
from ..step import StepResult, TrainStep
from .batches import Batches
from .chunked import batch_for
from .names import BEST
from .options import TrainOptions, called
from .reporting import Reporting
from .samples import Sampling
from .saving import RunFolder
from .stopping import Asked, is_out_of_memory
from .table import duration
from .table import loss as loss_text
from .validation import Best, Interrupted, Validation
from .weighing import are_weighed


@dataclass(eq=False)
class TrainingLoop:
    """The loop, and its state between two iterations."""

    step: TrainStep
    batches: Any
    validation: Validation
    args: TrainingArgs
    options: TrainOptions
    folder: RunFolder
    reporting: Reporting
    asked: Asked
    sampling: Sampling = field(init=False)  # to be set before `run`, once the folder is ready
    iteration: int = field(default=0, init=False)  # the last one that is finished
    begin: int = field(default=0, init=False)  # the last one of the run that this one continues
    started: float = field(default_factory=time.perf_counter, init=False)
    best: Best = field(default=Best(), init=False)
    # While an iteration is not finished, `_place` before it.
    begun: dict[str, Any] | None = field(default=None, init=False)

    def resume(self, checkpoint: str | Path) -> None:
        """Goes on from a checkpoint, or from the newest whole one for "auto"."""
        path, extra = self.folder.load(checkpoint)
        try:
            self.batches.restore(extra["data"])
            self.iteration, self.best = extra["iteration"], Best(**extra["best"])
            self.reporting.restore(extra)
            adapters = extra["adapters"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not a checkpoint of fine-tuning: {error!r}") from None
        self.folder.go_on(path, self.iteration, adapters)
        self.begin = self.iteration
        self.reporting.screen.resumed(self.iteration, self.best.loss, self.best.iteration)

    def run(self) -> str:
        """Runs to the last iteration, or until something ends it; then saves. Returns a sentence: why it ended.

        Raises TrainingStopped, KeyboardInterrupt or SystemExit that says what was saved.
        """
        try:
            return self._run()
        except KeyboardInterrupt as error:
            if str(error):
                raise
            # The second Ctrl-C: nothing is finished or saved.
            raise KeyboardInterrupt(f"stopped at once in iteration {self.iteration + 1}; {self.folder.saved}") from None

    def _run(self) -> str:
        self.step.model.train()
        because = ""
        try:
            because = self._iterations()
        except Interrupted:
            pass
        except Exception as error:
            self._raise_unless_asked(error)
        complete = self.asked.agreed is None and not self._failed_too_often()
        problems, fault = self.folder.save_all(self._state(), flush=complete)
        outcome = self.folder.outcome(problems)
        if fault is not None:
            self.reporting.line(f"iter {self.iteration:>5}  {outcome}")
            raise fault
        self.reporting.line(self._summary(), "bold")
        if (number := self.asked.agreed) is not None:
            self._end_as_asked(number, outcome)
        if self._failed_too_often():
            raise TrainingStopped(
                f"the loss, gradient or learning rate was not finite in {self.reporting.failures} steps in a row, up to"
                f" iteration {self.iteration}; {outcome}. Look at the data, lower the learning rate (--learning-rate),"
                f" or set {called('max_grad_norm')}"
            )
        if problems:
            raise TrainingStopped(f"the training is over, but {outcome}")
        self.sampling.last(self.step.model, self.iteration)
        return because

    def _iterations(self) -> str:
        """Runs the iterations; returns a sentence: why they ended."""
        args = self.args
        if self.iteration < args.iters:
            self.sampling.first(self.step.model, self.iteration)
            self.reporting.reader.restart_clock()
        while self.iteration < args.iters and self.asked.agreed is None and not self._failed_too_often():
            iteration = self.iteration + 1
            self.begun = self._place()
            try:
                batch = next(self.batches)
            except StopIteration:
                return self._ended_early(self.iteration, "there are no more batches")
            if self.validation.is_due(iteration) and (because := self._validate(iteration)):
                return self._ended_early(iteration, because)
            batch = batch_for(self.validation.loss, batch)
            if are_weighed(self.batches, self.step.accumulate):
                batch = *batch, self.batches.share
            self.step.extra = self.asked.vote()
            ready = self.reporting.reader.put(iteration, self._step(batch))
            self.iteration, self.begun = iteration, None
            self.reporting.take(ready)
            if args.clear_cache_threshold and mx.get_cache_memory() > args.clear_cache_threshold:
                mx.clear_cache()
            if iteration % args.steps_per_report == 0 or iteration == args.iters:
                self.reporting.drain()
                self.reporting.report()
            if iteration % args.steps_per_save == 0:
                self.reporting.drain()
                self.folder.save_numbered(self._state())
                self.reporting.reader.restart_clock()
        self.reporting.drain()
        return f"all {args.iters} iterations are done"

    def _ended_early(self, iteration: int, because: str) -> str:
        self.reporting.line(f"iter {iteration:>5}  {because}")
        return because

    def _step(self, batch: Any) -> StepResult:
        if self.iteration > self.begin:
            return self.step(*batch)
        with self.reporting.screen.progress.stage("compiling kernels (once)"):
            result: StepResult = self.folder.workers.together(partial(self.step, *batch))
        return result

    def _validate(self, iteration: int) -> str:
        """Validates before the step of ``iteration``; returns a sentence if the run ends for it."""
        self.reporting.drain()
        start = time.perf_counter()
        loss = self.validation.measure(self.step.model, iteration)
        if loss is not None:
            self.best = self.best.after(iteration, loss)
        best = self.best.iteration == iteration
        self.reporting.validation(iteration, loss, time.perf_counter() - start, best)
        if best and self.options.save_best:
            self.folder.save_best(self.iteration, self.best)
        self.reporting.reader.restart_clock()
        if self.options.early_stop_patience is None or self.best.stale < self.options.early_stop_patience:
            return ""
        than = "" if self.best.loss is None else f" than {self.best.loss:.4f} in iteration {self.best.iteration}"
        return f"stopped early: {self.best.stale} validations without a lower loss{than}"

    def _summary(self) -> str:
        """A line: what this run did, and where it is."""
        said = f"{self.iteration:,}{'' if self.iteration >= self.args.iters else f' of {self.args.iters:,}'} iterations"
        if self.begin:
            said += f", {self.iteration - self.begin:,} of them now,"
        said += f" in {duration(time.perf_counter() - self.started)}"
        if self.best.loss is not None:
            kept = f" -> {self.folder.path / BEST}" if self.options.save_best else ""
            said += f"; best {loss_text(self.best.loss)} at {self.best.iteration}{kept}"
        return said

    def _place(self) -> dict[str, Any]:
        """The position in the data and the best validation loss, which an iteration changes beside the step."""
        position = self.batches.position() if isinstance(self.batches, Batches) else None
        return {"data": position, "best": self.best._asdict()}

    def _state(self) -> dict[str, Any]:
        """The state of the loop for a checkpoint, as JSON can hold it."""
        return {"iteration": self.iteration, **(self.begun or self._place()), **self.reporting.state()}

    def _failed_too_often(self) -> bool:
        limit = self.options.nonfinite_limit
        return limit is not None and self.reporting.failures >= limit

    # Ends.

    def _raise_unless_asked(self, error: Exception) -> None:
        """Saves, and raises the error of an iteration; but not an error that the signal to stop has caused."""
        if is_out_of_memory(error):
            # The arrays that the device was computing are lost, and the weights with them.
            raise TrainingStopped(
                f"out of memory in iteration {self.iteration + 1}: {error}; {self.folder.saved}. Use a smaller"
                f" {called('batch_size')} or {called('max_seq_length')}, or {called('grad_checkpoint')}"
            ) from error
        if self.asked.many and is_lost(error):
            raise error
        if isinstance(error, RuntimeError):
            time.sleep(0.1)  # a signal to all processes may come here a moment after what it ends there
        if self.asked.signal is None or not isinstance(error, RuntimeError):
            self._tell_of_failure(error)
            raise error
        # Ctrl-C ends every process of a terminal: the compiler that MLX was waiting for, too.
        if self.asked.many:
            self._end_as_asked(self.asked.signal, self.folder.saved)

    def _tell_of_failure(self, error: Exception) -> None:
        """Saves as much as possible, and prints what was saved, because the error itself does not say that."""
        # Other workers are somewhere else, and cannot take part in saving.
        problems = [] if self.asked.many else self.folder.save_all(self._state())[0]
        changed = ""
        if isinstance(error, InputError) and self.folder.resumable:
            changed = """; after a change of the data it also needs allow=["data"] or --allow-change data"""
        self.reporting.line(f"iteration {self.iteration + 1}: {error}; {self.folder.outcome(problems)}{changed}")

    def _end_as_asked(self, number: int, outcome: str) -> None:
        message = f"stopped by {signal.Signals(number).name} after iteration {self.iteration}; {outcome}"
        if number == signal.SIGINT:
            raise KeyboardInterrupt(message)
        self.reporting.line(message)
        raise SystemExit(128 + number)
