"""The folder of a run: adapters, numbered adapters, the best weights, and checkpoints to resume from."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..base import InputError
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
from ..distributed import Workers
from ..step import TrainStep
from .log import is_log
from .names import BEST, BEST_LOSS, CHECKPOINTS, CONFIG, LOG, PREVIOUS, RECORD, REPORT
from .options import TrainOptions
from .stopping import is_lost_evaluation
from .validation import Best


def has_checkpoints(folder: Path) -> bool:
    """Whether a run has ever written a checkpoint beside the adapters in ``folder``, damaged or not."""
    return bool(numbered(folder / CHECKPOINTS))


def put_aside(folder: Path, checkpoints: list[Path], files: list[Path], line: Callable[[str], None]) -> None:
    """Moves what an earlier run left in ``folder`` to a new folder in it, and tells that in a ``line``."""
    if not checkpoints and not files:
        return
    aside = next(path for i in itertools.count(1) if not (path := folder / f"{PREVIOUS}-{i}").exists())
    (aside / CHECKPOINTS).mkdir(parents=True)
    for path in checkpoints:
        present(path).rename(aside / CHECKPOINTS / path.name)
    for path in files:
        path.rename(aside / path.name)
    whole = next((path for path in reversed(numbered(aside / CHECKPOINTS)) if is_whole(path)), None)
    newest = f"; resume=... or --resume {whole} goes on from there" if whole else ""
    line(f"what an earlier run left is in {aside}{newest}")


@dataclass(eq=False)
class RunFolder:
    """Saves the weights and checkpoints of a run beside ``adapters``; the first worker writes, all call the methods.

    The ``state`` that methods take is what a checkpoint has of the training loop; it has the ``iteration``. ``line``
    prints a line.
    """

    adapters: Path
    step: TrainStep
    options: TrainOptions
    settings: dict[str, Any]
    workers: Workers
    line: Callable[[str], None]
    adapter_files: list[str] = field(default_factory=list, init=False)  # the numbered ones of this run, oldest first
    resumable: str = field(default="", init=False)  # the end of sentences about what is saved, after a checkpoint

    @property
    def path(self) -> Path:
        return self.adapters.parent

    @property
    def saved(self) -> str:
        """A sentence: the newest files from which the run can be continued."""
        return self.workers.saved

    def _warn(self, message: str) -> None:
        self.line(f"warning: {message}")

    # Saving.

    def save_all(self, state: dict[str, Any], flush: bool = False) -> tuple[list[str], Exception | None]:
        """Saves the checkpoint and then the adapters, even if one of them fails.

        With ``flush`` a partly filled window is applied between them. So the adapters have it, which are the result;
        but not the checkpoint, so that more iterations can follow as if this had not been the last one.

        Returns the messages of all errors, and the first error that is a fault of the program.
        """
        problems: list[str] = []
        fault: Exception | None = None
        saves: list[Callable[[], object]] = [partial(self._save_checkpoint, state)]
        saves += [self.step.flush] if flush else []
        saves.append(partial(self._save_adapters, state["iteration"]))
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

    def outcome(self, problems: list[str]) -> str:
        """A sentence: what `save_all` could not save, and the files that exist."""
        return "; ".join([*(f"not saved: {problem}" for problem in problems), self.saved])

    def save_numbered(self, state: dict[str, Any]) -> None:
        """Saves in the middle of a run: the adapters, also under the number of the iteration, and a checkpoint."""
        iteration = state["iteration"]
        # Adapters first: a run that resumes from the checkpoint of an iteration does not write its adapters again.
        with self._going_on(iteration):
            self._save_numbered_adapters(iteration)
        with self._going_on(iteration):
            self._save_checkpoint(state)

    def save_best(self, iteration: int, best: Best) -> None:
        """Saves the weights in the folder `BEST`, and their loss; ``iteration`` is the last one that is finished."""
        with self._going_on(iteration):
            self.workers.first_does(partial(self._write_best, best))

    @contextmanager
    def _going_on(self, iteration: int) -> Iterator[None]:
        """If a save fails (disk full, weights not finite), prints why, and the run goes on."""
        try:
            yield
        except (OSError, InputError) as error:
            self.line(f"iter {iteration:>5}  not saved: {error}; training goes on, {self.saved}")

    def _save_numbered_adapters(self, iteration: int) -> None:
        file = self.path / f"{iteration:07d}_adapters.safetensors"
        self._save_adapters(iteration, file)
        self.adapter_files.append(file.name)
        while self.options.keep_adapters is not None and len(self.adapter_files) > self.options.keep_adapters:
            superfluous = self.path / self.adapter_files.pop(0)
            if self.workers.first:
                superfluous.unlink(missing_ok=True)
        self.line(f"iter {iteration:>5}  saved {file}")

    def _save_adapters(self, iteration: int, *more: Path) -> None:
        self.workers.first_does(partial(self._write_adapters, [self.adapters, *more]))
        self.workers.saved = f"{self.adapters} has the weights after iteration {iteration}{self.resumable}"

    def _write_adapters(self, files: list[Path]) -> None:
        weights = self._weights()
        for file in files:
            replace_arrays(file, weights)

    def _weights(self) -> dict[str, mx.array]:
        weights = dict(tree_flatten(self.step.model.trainable_parameters()))
        check_finite(weights)
        return weights

    def _others_in_best(self) -> list[str]:
        """The names of files in the folder `BEST` that are not of a run."""
        return sorted({path.name for path in (self.path / BEST).glob("*")} - {self.adapters.name, CONFIG, BEST_LOSS})

    def _write_best(self, found: Best) -> None:
        weights, best = self._weights(), self.path / BEST
        if others := self._others_in_best():
            raise InputError(f"{best} has {others[0]}, which is not ours; move it away")
        with replacing(best) as folder:
            save_arrays(folder / self.adapters.name, weights)
            (folder / BEST_LOSS).write_text(json.dumps({"iteration": found.iteration, "val_loss": found.loss}) + "\n")
            if (self.path / CONFIG).exists():
                shutil.copy(self.path / CONFIG, folder)

    def _save_checkpoint(self, state: dict[str, Any]) -> None:
        if not self.options.keep_checkpoints:
            return
        arrays = self.workers.together(partial(self.step.state_dict, everywhere=False))
        self.workers.first_does(partial(self._write_checkpoint, arrays, {**state, "adapters": self.adapter_files}))
        self._note_checkpoint(state["iteration"])

    def _write_checkpoint(self, arrays: dict[str, dict[str, mx.array]], extra: dict[str, Any]) -> None:
        checkpoints = self.path / CHECKPOINTS
        folder = checkpoints / f"{extra['iteration']:07d}"
        write_checkpoint(folder, self.step, arrays, extra, settings=self.settings)
        self._note_checkpoint(extra["iteration"])  # now, since another worker may have ended
        try:
            prune(checkpoints, self.options.keep_checkpoints)
        except (OSError, InputError) as error:
            self._warn(f"{folder} is saved, but older checkpoints were not removed: {error}")

    def _note_checkpoint(self, iteration: int) -> None:
        self.resumable = f', and resume="auto" or --resume goes on from iteration {iteration}'
        self.workers.saved = f"there is a checkpoint in {self.path / CHECKPOINTS}{self.resumable}"

    # Resuming.

    def load(self, checkpoint: str | Path) -> tuple[str, dict[str, Any]]:
        """Continues the step from a checkpoint, or from the newest whole one for "auto"; returns its path and state."""
        # The other workers get it from the first one, and need not have its files.
        found, read = self.workers.all_do(partial(self._read, checkpoint))
        path, extra, convert, own_rate = self.workers.first_does(lambda: [found, *read[1:]])
        state = self.workers.share(read.state, self.step.keeps)
        self.workers.all_do(partial(Contents(state, extra, convert, own_rate).into, self.step))
        return path, extra

    def _read(self, checkpoint: str | Path) -> tuple[str, Contents]:
        """The path and the contents of the checkpoint; nothing at all workers but the first."""
        if not self.workers.first:
            return "", Contents({}, {}, convert=False, own_rate=False)
        auto = checkpoint == "auto"
        path = latest_checkpoint(self.path / CHECKPOINTS, warn=self._warn) if auto else Path(checkpoint)
        settings, allow = self.settings, self.options.allow
        return str(path), read_checkpoint(path, self.step, settings=settings, allow=allow, warn=self._warn)

    def go_on(self, path: str, iteration: int, adapters: list[str]) -> None:
        """This run goes on from the checkpoint ``path``, whose run had written the numbered ``adapters``."""
        self.adapter_files = adapters
        self.workers.saved = f"{path} has the state after iteration {iteration}"
        self.line(f"iter {iteration:>5}  resumed from {path}")
        self.workers.first_does(partial(self._put_aside_after, iteration))

    def _put_aside_after(self, iteration: int) -> None:
        # They are damaged, or from the run that this one continues; later they must not be taken for this run's own.
        later = [path for path in numbered(self.path / CHECKPOINTS) if int(path.name) > iteration]
        put_aside(self.path, later, [], self.line)

    def begin_anew(self) -> None:
        """Puts aside what an earlier run wrote, so that it is not taken for this run's own: checkpoints, log, best."""
        log, best = self.path / LOG, self.path / BEST
        its = [self.path / name for name in (LOG, RECORD, REPORT)]
        files = [file for file in its if file.is_file()] if is_log(log) else []
        if best.is_dir() and not self._others_in_best():
            files.append(best)
        put_aside(self.path, numbered(self.path / CHECKPOINTS), files, self.line)
