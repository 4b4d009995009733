"""The fine-tuning loop: validates, reports, saves, and ends in a way that nothing is lost."""

from __future__ import annotations

import itertools
import math
import shutil
import signal
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs

from ..base import InputError, TrainingStopped
from ..checkpoint import (
    Contents,
    check_finite,
    is_whole,
    latest_checkpoint,
    numbered,
    present,
    prune,
    read_checkpoint,
    replace_arrays,
    replacing,
    save_arrays,
    write_checkpoint,
)
from ..distributed import Workers, is_lost
from ..step import TrainStep
from .batches import Batches
from .console import TrainingProgress
from .log import LOG, RunLog, is_log
from .metrics import Report, StepReader, failures
from .stopping import Asked, elected, is_lost_evaluation, is_out_of_memory, vote
from .validation import mean_loss, no_targets

CHECKPOINTS, BEST, PREVIOUS, CONFIG = "checkpoints", "best", "previous", "adapter_config.json"


class Options(NamedTuple):
    """What `compiled_adam.train` was told beside mlx-lm's arguments."""

    keep_checkpoints: int
    keep_adapters: int | None
    save_best: bool
    early_stop_patience: int | None
    nonfinite_limit: int | None
    settings: dict[str, Any]


class Validation(NamedTuple):
    """What a validation loss is made of; no data set, no validation."""

    dataset: Any
    loss: Callable[..., Any]
    iterate_batches: Callable[..., Any]


class _Interrupted(Exception):
    """Raised in the middle of a validation, which may take minutes."""


class TrainingLoop:
    """The loop, and what it knows between two iterations."""

    def __init__(
        self,
        step: TrainStep,
        batches: Any,
        validation: Validation,
        args: TrainingArgs,
        options: Options,
        progress: TrainingProgress,
        asked: Asked,
        callback: TrainingCallback | None,
        workers: Workers,
    ) -> None:
        self.step, self.batches, self.validation, self.args = step, batches, validation, args
        self.options, self.progress, self.asked = options, progress, asked
        self.callback = callback or TrainingCallback()
        self.workers = workers
        workers.saved = lambda: self.saved
        self.elected: int | None = None  # the signal that all workers act on
        self.unaccounted: list[dict[str, Any]] = []  # steps that are not yet summed over the workers
        self.log: RunLog | None = None
        self.adapters = Path(args.adapter_file)
        self.folder = self.adapters.parent
        self.saved, self.resumable = "nothing was saved", ""  # for messages
        self.reader, self.report = StepReader(step), Report()
        self.told = False  # that no token is trained
        # What a checkpoint has of the loop, beside the report's sums.
        self.iteration = 0  # the last one that is finished
        self.best: dict[str, Any] = {"loss": None, "iteration": None, "stale": 0}
        self.failures = 0  # steps in a row that were not finite
        self.adapter_files: list[str] = []  # the numbered ones that this run wrote, the oldest first
        self.begun: dict[str, Any] | None = None  # while an iteration is not finished, `_place` before it

    def _place(self) -> dict[str, Any]:
        """What an iteration changes beside the step: where in the data it is, and what validations have found."""
        position = self.batches.position() if isinstance(self.batches, Batches) else None
        return {"data": position, "best": self.best}

    def run(self) -> None:
        """Runs to the last iteration, or until something ends it; then saves."""
        try:
            self._run()
        except KeyboardInterrupt as error:
            if str(error):
                raise
            # The second Ctrl-C, which waits for nothing.
            raise KeyboardInterrupt(f"stopped at once in iteration {self.iteration + 1}; {self.saved}") from None

    def _run(self) -> None:
        self.step.model.train()
        try:
            ended = self._iterations()
        except _Interrupted:
            ended = None
        except Exception as error:
            if is_out_of_memory(error):
                # What the device was computing is lost, and the weights with it.
                raise TrainingStopped(
                    f"out of memory in iteration {self.iteration + 1}: {error}; {self.saved}."
                    " Use a smaller batch_size (--batch-size) or max_seq_length (--max-seq-length), or grad_checkpoint"
                    " (--grad-checkpoint)"
                ) from error
            if self.workers.many and is_lost(error):
                raise
            if isinstance(error, RuntimeError):
                time.sleep(0.1)  # a signal to all processes may come here a moment after what it ends there
            if not (self.asked.signal is not None and isinstance(error, RuntimeError)):
                self._tell_of_failure(error)
                raise
            # Ctrl-C ends every process of a terminal: the compiler that MLX was waiting for, too.
            if self.workers.many:
                self._end_as_asked(self.asked.signal, self.saved)
            ended = None
        if ended is not None:
            self.progress.line(ended)
        complete = self._stop_signal() is None and not self._failed_too_often()
        problems, fault = self._save_all(flush=complete)
        outcome = self._what_is_saved(problems)
        if fault is not None:
            self.progress.line(f"iter {self.iteration:>5}  {outcome}")
            raise fault
        if (number := self._stop_signal()) is not None:
            self._end_as_asked(number, outcome)
        if self._failed_too_often():
            raise TrainingStopped(
                f"the loss, gradient or learning rate was not finite in {self.failures} steps in a row, up to iteration"
                f" {self.iteration}; {outcome}. Look at the data, lower the learning rate (--learning-rate), or set"
                " max_grad_norm (--max-grad-norm)"
            )
        if problems:
            raise TrainingStopped(f"the training is over, but {outcome}")

    def _tell_of_failure(self, error: Exception) -> None:
        """Saves what can be saved, and says what that is: the error itself is not about it."""
        # Other workers are somewhere else, and cannot take part in saving.
        problems = [] if self.workers.many else self._save_all()[0]
        changed = (
            """; after a change of the data it also needs allow=["data"] or --allow-change data"""
            if isinstance(error, InputError) and self.resumable
            else ""
        )
        self.progress.line(f"iteration {self.iteration + 1}: {error}; {self._what_is_saved(problems)}{changed}")

    def _iterations(self) -> str | None:
        """Returns why it ended early in a way that is not an error."""
        args = self.args
        while self.iteration < args.iters and self._stop_signal() is None and not self._failed_too_often():
            iteration = self.iteration + 1
            last = iteration == args.iters
            self.begun = self._place()
            try:
                batch = next(self.batches)
            except StopIteration:
                return f"iter {self.iteration:>5}  there are no more batches"
            if self.validation.dataset and (iteration == 1 or iteration % args.steps_per_eval == 0 or last):
                self._drain()
                self._validate(iteration)
                stale, best = self.best["stale"], self.best
                if self.options.early_stop_patience is not None and stale >= self.options.early_stop_patience:
                    than = "" if best["loss"] is None else f" than {best['loss']:.4f} in iteration {best['iteration']}"
                    return f"iter {iteration:>5}  stopped early: {stale} validations without a lower loss{than}"
            self.step.extra = vote(self.asked.signal)
            ready = self.reader.put(iteration, self.step(*batch))
            self.iteration, self.begun = iteration, None
            self._take(ready)
            self.workers.beat()
            self.progress.advance()
            if args.clear_cache_threshold and mx.get_cache_memory() > args.clear_cache_threshold:
                mx.clear_cache()
            if iteration % args.steps_per_report == 0 or last:
                self._drain()
                info = self.report.close()
                self.progress.report(info)
                self._tell_if_nothing_is_trained(info)
                self.callback.on_train_loss_report(info)
            if iteration % args.steps_per_save == 0:
                self._drain()
                self._save_and_go_on()
        self._drain()
        return None

    def _tell_if_nothing_is_trained(self, info: dict[str, Any]) -> None:
        """A line, once: otherwise a run that teaches the model nothing looks like one that does."""
        if not info["trained_tokens"] and not self.told:
            self.told = True
            self.warn(f"no token has been trained yet: {no_targets(self.args.max_seq_length)}")

    def _stop_signal(self) -> int | None:
        """The signal to stop for. Workers get theirs at different times, and stop when all know, after an update."""
        return self.elected if self.workers.many else self.asked.signal

    def _failed_too_often(self) -> bool:
        limit = self.options.nonfinite_limit
        return limit is not None and self.failures >= limit

    def _drain(self) -> None:
        """Waits for the last step and accounts for everything."""
        self._take(self.reader.drain())
        self._account()

    def _take(self, entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            self.elected = elected(entry.pop("votes", 0.0)) or self.elected
            self.unaccounted.append(entry)
            # With other workers, whose losses are not known here, that is done for many steps at once; but soon for
            # those that fail, which the gradient's norm says to all alike.
            if not self.workers.many or not math.isfinite(entry["grad_norm"] or 0.0):
                self._account()

    def _account(self) -> None:
        entries, self.unaccounted = self.workers.mean_steps(self.unaccounted), []
        for entry in entries:
            self.report.add(entry)
            if self.log is not None:
                self.log.write(entry)
            self.failures = failures(self.failures, entry)

    def _validate(self, iteration: int) -> None:
        dataset, loss, iterate_batches = self.validation
        args, start = self.args, time.perf_counter()
        random = np.random.get_state()

        def before_batch() -> None:
            if self.asked.signal is not None and not self.workers.many:
                raise _Interrupted
            self.workers.beat()

        val_loss = mean_loss(
            self.step.model,
            dataset,
            loss,
            before_batch,
            args.clear_cache_threshold,
            batch_size=args.batch_size,
            num_batches=args.val_batches,
            max_seq_length=args.max_seq_length,
            iterate_batches=iterate_batches,
        )
        self.step.model.train()
        if iteration != 1 and iteration % args.steps_per_eval:
            # Made only because the run ends here; if more iterations follow, they are those of a longer run.
            np.random.set_state(random)
        seconds = time.perf_counter() - start
        if val_loss is None:
            self.progress.line(f"iter {iteration:>5}  no validation loss: {no_targets(args.max_seq_length)}")
        else:
            self.progress.line(f"iter {iteration:>5}  validation loss {val_loss:.4f}")
        known = math.nan if val_loss is None else val_loss
        if self.log is not None:
            self.log.write({"iteration": iteration, "val_loss": known, "seconds": seconds})
        self.callback.on_val_loss_report({"iteration": iteration - 1, "val_loss": known, "val_time": seconds})
        if val_loss is not None:
            self._compare_with_best(iteration, val_loss)
        self.reader.restart_clock()

    def _compare_with_best(self, iteration: int, val_loss: float) -> None:
        if math.isfinite(val_loss) and (self.best["loss"] is None or val_loss < self.best["loss"]):
            self.best = {"loss": val_loss, "iteration": iteration, "stale": 0}
            if self.options.save_best:
                self._going_on(self._save_best)
        else:
            self.best = {**self.best, "stale": self.best["stale"] + 1}

    def _end_as_asked(self, number: int, outcome: str) -> None:
        message = f"stopped by {signal.Signals(number).name} after iteration {self.iteration}; {outcome}"
        if number == signal.SIGINT:
            raise KeyboardInterrupt(message)
        self.progress.line(message)
        raise SystemExit(128 + number)

    # Saving.

    def _save_all(self, flush: bool = False) -> tuple[list[str], Exception | None]:
        """Saves the checkpoint and then the adapters, each whether or not the other can be; returns what went wrong,
        and the first error that is a fault of the program.

        With ``flush`` a partly filled window is applied between them: to the adapters, which are the result, but not to
        the checkpoint, which more iterations can follow as if this had not been the last one.
        """
        problems: list[str] = []
        fault: Exception | None = None
        saves = [self._save_checkpoint, *([self.step.flush] if flush else []), self._save_adapters]
        for save in saves:
            try:
                save()
            except Exception as error:
                if self.workers.many and isinstance(error, RuntimeError):
                    raise  # no connection any more
                known = isinstance(error, (OSError, InputError)) or is_lost_evaluation(error)
                problems.append(str(error) if known else repr(error))
                fault = fault if known else fault or error
        return problems, fault

    def _what_is_saved(self, problems: list[str]) -> str:
        return "; ".join([*(f"not saved: {problem}" for problem in problems), self.saved])

    def _save_and_go_on(self) -> None:
        # Adapters first: who resumes from the checkpoint of an iteration does not write its adapters again.
        for save in (self._save_numbered, self._save_checkpoint):
            self._going_on(save)
        self.reader.restart_clock()

    def _going_on(self, save: Callable[[], None]) -> None:
        """A save that fails in the middle of a run (disk full, weights not finite) is reported; what is there stays."""
        try:
            save()
        except (OSError, InputError) as error:
            self.progress.line(f"iter {self.iteration:>5}  not saved: {error}; training goes on, {self.saved}")

    def _save_numbered(self) -> None:
        file = self.folder / f"{self.iteration:07d}_adapters.safetensors"
        self._save_adapters(file)
        self.adapter_files = [name for name in self.adapter_files if name != file.name] + [file.name]
        while self.options.keep_adapters is not None and len(self.adapter_files) > self.options.keep_adapters:
            superfluous = self.folder / self.adapter_files.pop(0)
            if self.workers.first:
                superfluous.unlink(missing_ok=True)
        self.progress.line(f"iter {self.iteration:>5}  saved {file}")

    def _weights(self) -> dict[str, mx.array]:
        weights = dict(tree_flatten(self.step.model.trainable_parameters()))
        check_finite(weights)
        return weights

    def _save_adapters(self, *more: Path) -> None:
        def write() -> None:
            weights = self._weights()
            for file in (self.adapters, *more):
                replace_arrays(file, weights)

        self.workers.first_does(write)
        self.saved = f"{self.adapters} has the weights after iteration {self.iteration}{self.resumable}"

    def _save_checkpoint(self) -> None:
        if not self.options.keep_checkpoints:
            return
        checkpoints = self.folder / CHECKPOINTS
        extra = {
            "iteration": self.iteration,
            **(self.begun or self._place()),
            "report": self.report.sums,
            "failures": self.failures,
            "adapters": self.adapter_files,
        }
        state = self.workers.together(partial(self.step.state_dict, everywhere=False))

        def write() -> None:
            folder = checkpoints / f"{self.iteration:07d}"
            write_checkpoint(folder, self.step, state, extra, settings=self.options.settings)
            self._note_checkpoint()  # now, since another worker may have ended
            try:
                prune(checkpoints, self.options.keep_checkpoints)
            except (OSError, InputError) as error:
                self.warn(f"{folder} is saved, but older checkpoints were not removed: {error}")

        self.workers.first_does(write)
        self._note_checkpoint()

    def _note_checkpoint(self) -> None:
        self.resumable = f', and resume="auto" or --resume goes on from iteration {self.iteration}'
        self.saved = f"there is a checkpoint in {self.folder / CHECKPOINTS}{self.resumable}"

    def _save_best(self) -> None:
        def write() -> None:
            weights = self._weights()
            if others := sorted({p.name for p in (self.folder / BEST).glob("*")} - {self.adapters.name, CONFIG}):
                raise InputError(f"{self.folder / BEST} has {others[0]}, which is not ours; move it away")
            with replacing(self.folder / BEST) as folder:
                save_arrays(folder / self.adapters.name, weights)
                config = self.folder / CONFIG
                if config.exists():
                    shutil.copy(config, folder)

        self.workers.first_does(write)

    # Resuming.

    def resume(self, checkpoint: str | Path, allow: Collection[str]) -> None:
        """Goes on from a checkpoint, or from the newest whole one for "auto"."""

        def load() -> dict[str, Any]:
            auto = checkpoint == "auto"
            path = latest_checkpoint(self.folder / CHECKPOINTS, warn=self.warn) if auto else Path(checkpoint)
            read = read_checkpoint(path, self.step, settings=self.options.settings, allow=allow, warn=self.warn)
            state.update(read.state)
            return {"path": str(path), **read._replace(state={})._asdict()}

        # The other workers get it from the first one, and need not have its files.
        state: dict[str, dict[str, mx.array]] = {}
        loaded = self.workers.first_does(load)
        path, extra, loaded["state"] = loaded.pop("path"), loaded["extra"], self.workers.share(state, self.step.keeps)
        self.workers.all_do(lambda: Contents(**loaded).into(self.step))
        try:
            self.batches.restore(extra["data"])
            self.iteration, self.best, self.failures = extra["iteration"], extra["best"], extra["failures"]
            # A checkpoint of an earlier version has counted every iteration's loss.
            self.report.sums = {"losses": extra["report"]["iterations"], **extra["report"]}
            self.adapter_files = extra["adapters"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not a checkpoint of fine-tuning: {error!r}") from None
        self.saved = f"{path} has the state after iteration {self.iteration}"
        self.progress.line(f"iter {self.iteration:>5}  resumed from {path}")
        self.progress.advance(self.iteration)
        # Those after it are damaged, or of a run that this one leaves: neither may be taken for this run's.
        self.workers.first_does(
            lambda: self._put_aside([p for p in self._checkpoints() if int(p.name) > self.iteration], [])
        )

    def begin_anew(self) -> None:
        """Puts aside the checkpoints and the log of an earlier run, which must not be taken for this one's."""
        log = self.folder / LOG
        self._put_aside(self._checkpoints(), [log] if is_log(log) else [])

    def warn(self, message: str) -> None:
        self.progress.line(f"warning: {message}")

    def _checkpoints(self) -> list[Path]:
        return numbered(self.folder / CHECKPOINTS)

    def _put_aside(self, checkpoints: list[Path], files: list[Path]) -> None:
        if not checkpoints and not files:
            return
        aside = next(path for i in itertools.count(1) if not (path := self.folder / f"{PREVIOUS}-{i}").exists())
        (aside / CHECKPOINTS).mkdir(parents=True)
        for path in checkpoints:
            present(path).rename(aside / CHECKPOINTS / path.name)
        for path in files:
            path.rename(aside / path.name)
        whole = next((path for path in reversed(numbered(aside / CHECKPOINTS)) if is_whole(path)), None)
        newest = f"; resume=... or --resume {whole} goes on from there" if whole else ""
        self.progress.line(f"what an earlier run left is in {aside}{newest}")
