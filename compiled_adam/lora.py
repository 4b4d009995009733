"""Fine-tuning with mlx-lm's models, data sets and files, on a compiled step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

try:
    from mlx_lm.tuner import trainer as mlx_lm_trainer
    from mlx_lm.tuner.callbacks import TrainingCallback
except ImportError as error:
    raise ImportError(
        f"fine-tuning needs mlx-lm ({error}); install it with `pip install 'compiled-adam[lm]'`"
    ) from error

from .progress import TrainingProgress
from .step import StepResult, TrainStep, make_step


def train(
    model: nn.Module,
    optimizer: optim.Optimizer,
    train_dataset: Any,
    val_dataset: Any = None,
    args: mlx_lm_trainer.TrainingArgs | None = None,
    loss: Callable[..., Any] = mlx_lm_trainer.default_loss,
    iterate_batches: Callable[..., Any] = mlx_lm_trainer.iterate_batches,
    training_callback: TrainingCallback | None = None,
    *,
    max_traces: int = 64,
) -> None:
    """Fine-tunes ``model`` in place: the call, the defaults and the adapter files of ``mlx_lm.tuner.trainer.train``.

    What differs: accumulation weights micro-batches by their tokens and applies the last, partly filled window;
    the allocator's cache is cleared only beyond a ``clear_cache_threshold`` above 0, not after every step; reports
    have three more keys: ``grad_norm`` (of the last update, None before the first), ``skipped_steps`` and
    ``traces`` (gradient traces so far, one for each batch shape).

    Args:
        model: an mlx-lm model whose adapter or unfrozen parameters are trained.
        optimizer: any MLX optimizer; its learning rate counts updates, not iterations.
        train_dataset: what ``iterate_batches`` takes, by default mlx-lm's ``CacheDataset``.
        val_dataset: the same for validation at the first, the last and every ``steps_per_eval``-th iteration.
        args: ``mlx_lm.tuner.trainer.TrainingArgs``; None means its defaults.
        loss: ``loss(model, *batch)`` returns the mean loss over tokens and the number of tokens.
        iterate_batches: the generator of batches, called as mlx-lm calls it.
        training_callback: gets ``on_train_loss_report(info)`` and ``on_val_loss_report(info)``.

        max_traces: how many batch shapes stay compiled, as in `make_step`.

    Raises:
        ValueError: more than one distributed process; unusable arguments, as in `make_step`.
    """
    args = mlx_lm_trainer.TrainingArgs() if args is None else args
    world = mx.distributed.init()
    if world.size() > 1:
        raise ValueError(f"train runs in one process, but this is one of {world.size()}; start it without mlx.launch")
    if (limit := mx.device_info().get("max_recommended_working_set_size")) is not None:
        mx.set_wired_limit(int(limit))  # Metal: keeps weights from being paged out between steps
    if args.grad_checkpoint:
        mlx_lm_trainer.grad_checkpoint(model.layers[0])

    Path(args.adapter_file).parent.mkdir(parents=True, exist_ok=True)
    step = make_step(
        model, loss, optimizer, accumulate=args.grad_accumulation_steps, weighted=True, max_traces=max_traces
    )
    report = _Report(step)
    batches = iterate_batches(
        dataset=train_dataset,
        batch_size=args.batch_size,
        max_seq_length=args.max_seq_length,
        loop=True,
        comm_group=world,
    )
    with TrainingProgress(args.iters) as progress:
        model.train()
        for iteration, batch in zip(range(1, args.iters + 1), batches, strict=False):
            last = iteration == args.iters
            if val_dataset and (iteration == 1 or iteration % args.steps_per_eval == 0 or last):
                with report.paused():
                    info = _validate(model, val_dataset, args, loss, iterate_batches, iteration)
                progress.line(f"iter {iteration:>5}  validation loss {info['val_loss']:.4f}")
                if training_callback is not None:
                    training_callback.on_val_loss_report(info)
            report.add(step(*batch))
            progress.advance()
            if args.clear_cache_threshold and mx.get_cache_memory() > args.clear_cache_threshold:
                mx.clear_cache()
            if iteration % args.steps_per_report == 0 or last:
                info = report.close(iteration)
                progress.report(info)
                if training_callback is not None:
                    training_callback.on_train_loss_report(info)
            if iteration % args.steps_per_save == 0:
                with report.paused():
                    checkpoint = Path(args.adapter_file).parent / f"{iteration:07d}_adapters.safetensors"
                    _save(model, args.adapter_file, checkpoint)
                progress.line(f"iter {iteration:>5}  saved {checkpoint}")
    step.flush()
    _save(model, args.adapter_file)


class _Report:
    """What is summed between two training reports; nothing waits for the device before `close`."""

    def __init__(self, step: TrainStep) -> None:
        self._step = step
        self._grad_norm: mx.array | None = None
        self._trained_tokens = 0
        self._open()

    def _open(self) -> None:
        self._loss, self._tokens, self._iterations = mx.array(0.0), mx.array(0), 0
        self._start = time.perf_counter()

    def add(self, result: StepResult) -> None:
        self._loss = self._loss + result.loss
        self._tokens = self._tokens + result.aux[0]
        self._iterations += 1
        if result.updated:
            self._grad_norm = result.grad_norm
        self._learning_rate = result.learning_rate
        self._skipped = result.skipped
        mx.async_eval(self._loss, self._tokens)  # or the graph would grow until the report

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of a validation or a save out of the training speed."""
        mx.eval(self._loss)
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def close(self, iteration: int) -> dict[str, Any]:
        """The dictionary for callbacks; starts the next report."""
        loss = cast(float, self._loss.item()) / self._iterations
        tokens = cast(int, self._tokens.item())
        seconds = time.perf_counter() - self._start
        self._trained_tokens += tokens
        info = {
            "iteration": iteration,
            "train_loss": loss,
            "learning_rate": None if self._learning_rate is None else self._learning_rate.item(),
            "iterations_per_second": self._iterations / seconds,
            "tokens_per_second": tokens / seconds,
            "trained_tokens": self._trained_tokens,
            "peak_memory": mx.get_peak_memory() / 1e9,
            "grad_norm": None if self._grad_norm is None else self._grad_norm.item(),
            "skipped_steps": self._skipped.item(),
            "traces": self._step.traces["grad"],
        }
        self._open()
        return info


def _validate(
    model: nn.Module,
    dataset: Any,
    args: mlx_lm_trainer.TrainingArgs,
    loss: Callable[..., Any],
    iterate_batches: Callable[..., Any],
    iteration: int,
) -> dict[str, Any]:
    start = time.perf_counter()
    val_loss = mlx_lm_trainer.evaluate(
        model=model,
        dataset=dataset,
        loss=loss,
        batch_size=args.batch_size,
        num_batches=args.val_batches,
        max_seq_length=args.max_seq_length,
        iterate_batches=iterate_batches,
        # evaluate's default clears the cache after each batch; this never does, or beyond the threshold.
        clear_cache_threshold=args.clear_cache_threshold or sys.maxsize,
    )
    model.train()
    return {"iteration": iteration - 1, "val_loss": val_loss, "val_time": time.perf_counter() - start}


def _save(model: nn.Module, *files: str | Path) -> None:
    weights = dict(tree_flatten(model.trainable_parameters()))
    for file in files:
        mx.save_safetensors(str(file), weights)
