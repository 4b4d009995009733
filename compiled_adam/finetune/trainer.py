"""Fine-tuning with mlx-lm's models, data sets and files, on a compiled step; a run can be stopped and resumed.

With ``mlx.launch`` each worker takes its part of every batch of ``batch_size``, and all workers together are one run,
with the results of a single process. The first worker prints, logs and saves. It also reads the checkpoint of a resumed
run, which any number of workers can continue. All workers have the same random state, so their dropout masks are the
same where shapes are the same. Callbacks are called at every worker.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from .packages import needed

with needed("fine-tuning", "mlx-lm", "lm"):
    from mlx_lm.tuner import trainer as mlx_lm_trainer
    from mlx_lm.tuner.callbacks import TrainingCallback

from ..base import InputError, fingerprint, random_state
from ..checkpoint import locked, output
from ..distributed import Workers, join
from ..step import TrainStep, losses, make_step
from .batches import Batches
from .chunked import most_traces
from .console import TrainingProgress
from .data import tokenize
from .history import History
from .log import RunLog, is_log, read
from .loop import TrainingLoop
from .metrics import StepReader
from .names import CHECKPOINTS, CONFIG, LOG, RECORD
from .options import WHOLE, TrainOptions, called, check_whole
from .recompute import recomputed
from .record import Record
from .reporting import Reporting
from .rows import located
from .samples import Sampling
from .saving import RunFolder, has_checkpoints
from .screen import RunScreen
from .stopping import asked_to_stop
from .validation import Validation
from .weighing import are_weighed, weighed

TrainingArgs = mlx_lm_trainer.TrainingArgs


def train(
    model: nn.Module,
    optimizer: optim.Optimizer,
    train_dataset: Any,
    val_dataset: Any = None,
    args: TrainingArgs | None = None,
    loss: Callable[..., Any] = losses.next_token,
    iterate_batches: Callable[..., Any] = Batches,
    training_callback: TrainingCallback | None = None,
    *,
    max_traces: int = TrainOptions.max_traces,
    log: bool = TrainOptions.log,
    keep_checkpoints: int = TrainOptions.keep_checkpoints,
    keep_adapters: int | None = TrainOptions.keep_adapters,
    save_best: bool = TrainOptions.save_best,
    early_stop_patience: int | None = TrainOptions.early_stop_patience,
    nonfinite_limit: int | None = TrainOptions.nonfinite_limit,
    resume: str | Path | None = TrainOptions.resume,
    settings: Mapping[str, Any] | None = TrainOptions.settings,
    allow: Collection[str] = TrainOptions.allow,
    adapter_config: Mapping[str, Any] | None = TrainOptions.adapter_config,
    reduce_dtype: str = TrainOptions.reduce_dtype,
    shard_state: bool = TrainOptions.shard_state,
    worker_timeout: float = TrainOptions.worker_timeout,
    weighted: bool = TrainOptions.weighted,
    sample: Callable[[nn.Module, Callable[[], bool]], list[dict[str, str]]] | None = TrainOptions.sample,
) -> History:
    """Fine-tunes ``model`` in place: the call, the defaults and the adapter files of ``mlx_lm.tuner.trainer.train``.

    Accumulation weights micro-batches by their tokens (``weighted``), and applies the last, partly filled window. The
    cache of the allocator is cleared only beyond a ``clear_cache_threshold`` above 0. Weights that are not finite are
    never saved. Reports have three more keys: ``grad_norm`` (of the last update, or None), ``skipped_steps`` and
    ``traces`` (so far, one for each batch shape).

    Returns:
        a `History` of the reports and validations; in a resumed run also of those before, if ``log`` is on.

    Args:
        model, optimizer: as in mlx-lm; the learning rate counts updates, not iterations.
        train_dataset, val_dataset, args: as in mlx-lm; None for no validation, and for the defaults of mlx-lm.
        loss: ``loss(model, *batch)`` returns the mean loss over tokens, and the number of tokens, which may be 0.
            Default: `losses.next_token`. mlx-lm's `default_loss` also trains one token of padding.
        iterate_batches: called as mlx-lm calls it; all workers must get the same number of batches. Default: `Batches`.
        training_callback: gets ``on_train_loss_report(info)`` and ``on_val_loss_report(info)``.
        max_traces, ...: see `TrainOptions`.

    Raises:
        ValueError: unusable arguments or checkpoints, or workers that were started with different options.
        TrainingStopped: the run could not go on. The message says why, and what was saved. After other errors, which
            are raised as they are, a line says that. After Ctrl-C or SIGTERM the step is finished and saved, and
            KeyboardInterrupt or SystemExit(143) is raised.
        OSError: another process is training in the folder of the adapters.
    """
    options = TrainOptions(
        *(max_traces, log, keep_checkpoints, keep_adapters, save_best, early_stop_patience, nonfinite_limit, resume),
        *(settings, allow, adapter_config, reduce_dtype, shard_state, worker_timeout, weighted, sample),
    )
    job = Job(model, optimizer, train_dataset, val_dataset, loss, iterate_batches, args or TrainingArgs(), options)
    return job.run(training_callback)


@dataclass
class Job:
    """The arguments of a call of `train`, checked, and the run that they make."""

    model: nn.Module
    optimizer: optim.Optimizer
    train_dataset: Any
    val_dataset: Any
    loss: Callable[..., Any]
    iterate_batches: Callable[..., Any]
    args: TrainingArgs
    options: TrainOptions

    def __post_init__(self) -> None:
        self.train_dataset = located(self.train_dataset, "train set")
        self.val_dataset = located(self.val_dataset, "validation set")
        for name, value in vars(self.args).items():
            if name in WHOLE:
                check_whole(name, value)
        if not self.val_dataset:
            self.options.check_validation()
        self.folder = Path(self.args.adapter_file).parent

    def run(self, callback: TrainingCallback | None, facts: Iterable[tuple[str, str]] = ()) -> History:
        """Trains, and saves at the end. ``facts`` are names and values for a box above the table."""
        if (limit := mx.device_info().get("max_recommended_working_set_size")) is not None:
            mx.set_wired_limit(int(limit))  # Metal: keeps weights from being paged out between steps
        args, options = self.args, self.options
        with ExitStack() as stack:
            if args.grad_checkpoint:
                stack.enter_context(recomputed(self.model.layers))
            workers = stack.enter_context(Workers(join(options.worker_timeout), options.worker_timeout))
            workers.first_does(self._make_folder)
            anew = options.resume == "auto" and not workers.first_does(partial(has_checkpoints, self.folder))
            resume = None if anew else options.resume
            batches = self._batches(workers)
            step = self._step(workers, batches)
            durable = bool(options.keep_checkpoints) or resume is not None
            self._check_batches(batches, durable)
            settings = self._settings(batches, durable, workers.first)
            workers.check_alike(self._alike(settings, resume is not None))
            if options.log or durable:
                workers.first_does(lambda: stack.enter_context(locked(self.folder)))
            asked = stack.enter_context(asked_to_stop(workers.many))
            progress = stack.enter_context(TrainingProgress(args.iters, quiet=not workers.first))
            screen = RunScreen(progress, batches.per_epoch if isinstance(batches, Batches) else None)
            validation = Validation(self.val_dataset, self.loss, self.iterate_batches, args, workers, asked, progress)
            traces = None
            if isinstance(batches, Batches) and batches.grouped:
                traces = most_traces(self.loss, batches.forecast().traces)
            callback = callback or TrainingCallback()
            reporting = Reporting(StepReader(step), screen, callback, workers, asked, args.max_seq_length, traces)
            saved = RunFolder(Path(args.adapter_file), step, options, settings, workers, progress.line)
            loop = TrainingLoop(step, batches, validation, args, options, saved, reporting, asked)
            if resume is not None:
                loop.resume(resume)
            elif options.log or durable:
                workers.first_does(saved.begin_anew)
            if anew:
                progress.line(
                    f"there is no checkpoint in {self.folder / CHECKPOINTS} yet: the run starts from the beginning"
                )
            self._show(screen, batches, facts)
            if loop.iteration >= args.iters:
                progress.line(
                    f"iter {loop.iteration:>5}  all {args.iters} iterations are done; to train on, give more"
                    f" {called('iters')} or epochs"
                )
            if options.log and workers.first:
                reporting.log = stack.enter_context(closing(RunLog(self.folder / LOG, loop.iteration, reporting.warn)))
            file = self.folder / RECORD if options.log and workers.first else None
            record = stack.enter_context(Record(file, loop.iteration, workers.size, reporting.warn))
            loop.sampling = Sampling(options.sample, record, workers, lambda: asked.signal is not None, reporting.warn)
            if options.log and resume is not None:
                earlier = workers.first_does(partial(self._earlier, loop.iteration))
                reporting.history.follow(earlier, args.steps_per_report)
            workers.first_does(self._write_config)
            record.because = loop.run()
            reporting.history.report()  # of an early end
            return reporting.history

    def _show(self, screen: RunScreen, batches: Iterator[Any], facts: Iterable[tuple[str, str]]) -> None:
        """Prints the box with the ``facts``; without any, one line about epochs."""
        run = in_epochs(self.args.iters, batches) if isinstance(batches, Batches) else f"{self.args.iters} iterations"
        if facts:
            screen.box("compiled-adam lora", [*facts, ("run", run), ("folder", str(self.folder))])
        elif screen.per_epoch:
            screen.progress.line(run)

    def _earlier(self, iteration: int) -> list[dict[str, Any]]:
        """The lines of the log up to an iteration; none if there is no log, which does not end a run."""
        with suppress(OSError, InputError):
            # The log may be a pipe, which would be waited for, or old, if it could not be written anew.
            if is_log(self.folder / LOG):
                return [line for line in read(self.folder / LOG) if line["iteration"] <= iteration]
        return []

    def _make_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is a file; give a folder for the adapters")
        self.folder.mkdir(parents=True, exist_ok=True)

    def _step(self, workers: Workers, batches: Iterator[Any]) -> TrainStep:
        return make_step(
            self.model,
            weighed(self.loss) if are_weighed(batches, self.args.grad_accumulation_steps) else self.loss,
            self.optimizer,
            accumulate=self.args.grad_accumulation_steps,
            weighted=self.options.weighted,
            max_traces=self.options.max_traces,
            group=workers.group,
            reduce_dtype=self.options.reduce_dtype,
            shard_state=self.options.shard_state,
        )

    def _batches(self, workers: Workers) -> Iterator[Any]:
        sizes = {"batch_size": self.args.batch_size, "max_seq_length": self.args.max_seq_length}
        return iter(self.iterate_batches(dataset=self.train_dataset, loop=True, comm_group=workers.group, **sizes))

    def _check_batches(self, batches: Iterator[Any], durable: bool) -> None:
        if durable and not isinstance(batches, Batches):
            raise InputError("a checkpoint needs batches that know their position: use compiled_adam's iterate_batches")
        size = self.args.batch_size
        if self.val_dataset and isinstance(batches, Batches) and len(self.val_dataset) < size:
            raise InputError(
                f"the validation set has {len(self.val_dataset)} examples, fewer than batch_size={size};"
                f" give it more, or use a smaller {called('batch_size')}"
            )

    def _settings(self, batches: Any, durable: bool, first: bool) -> dict[str, Any]:
        """The settings that a resumed run must have, too; with digests of the examples if it is ``durable``."""
        args = self.args
        data: dict[str, Any] = {}
        if isinstance(batches, Batches):
            data.update(batches.settings())
            if durable or batches.grouped:
                tokenize(self.train_dataset, quiet=not first)
        if durable:
            validated = Batches(self.val_dataset, 1, args.max_seq_length).rows() if self.val_dataset else None
            data["data"] = fingerprint.of_rows(batches.rows())
            data["validation data"] = None if validated is None else fingerprint.of_rows(validated)
        # The arguments decide which batches come, and after which of them a window ends.
        return {
            **(self.options.settings or {}),
            **data,
            "batch_size": args.batch_size,
            "max_seq_length": args.max_seq_length,
            "examples": len(self.train_dataset),
            "steps_per_eval": args.steps_per_eval if self.val_dataset else None,
            "val_batches": args.val_batches if self.val_dataset else None,
            "validation examples": len(self.val_dataset) if self.val_dataset else 0,
            "grad_checkpoint": args.grad_checkpoint,  # kernels are fused differently, and so rounded differently
        }

    def _alike(self, settings: dict[str, Any], resumed: bool) -> dict[str, Any]:
        """The values that must be equal at all workers: they decide when workers meet, and which batches they share."""
        names = ("keep_checkpoints", "keep_adapters", "save_best", "early_stop_patience", "nonfinite_limit", "log")
        return {
            **{name: value for name, value in asdict(self.args).items() if name != "adapter_file"},
            **{name: getattr(self.options, name) for name in names},
            **settings,
            "resume": resumed,
            "sample": self.options.sample is not None,
            "NumPy's random state": fingerprint.of_numpy(),
            "MLX's random state": random_state.get().tolist(),
            "validation set": bool(self.val_dataset),
        }

    def _write_config(self) -> None:
        if self.options.adapter_config is not None:
            text = json.dumps(dict(sorted(self.options.adapter_config.items())), indent=4)
            output.write(self.folder / CONFIG, text.encode())


def in_epochs(iterations: int, batches: Batches) -> str:
    """A line such as "100 iterations = 3.7 epochs of 27 batches", and what batches of similar length are like."""
    count = batches.per_epoch
    epochs = iterations / count
    said = f"{iterations} iterations = {f'{epochs:.3g}' if epochs < 100 else f'{epochs:.0f}'} epochs of {count} batches"
    if not batches.grouped:
        return said
    rows, (shapes, overhead) = batches.rows_in_epoch(), batches.forecast()
    examples = f"{min(rows)} to {max(rows)} examples" if min(rows) < max(rows) else f"{rows[0]} examples"
    return f"{said} of {examples} of similar length; {shapes} shapes, {100 * overhead:.1f} % padding"
