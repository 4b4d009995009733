"""The mean loss over a data set, by mlx-lm's rule, and the validations of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.trainer import TrainingArgs

from ..distributed import Workers, join
from .chunked import batch_for
from .console import TrainingProgress
from .options import called
from .stopping import Asked


def no_targets(max_seq_length: int) -> str:
    """The end of a message about batches without a target: the probable reason, and what to do."""
    return (
        f"no example has a token to predict. With {called('mask_prompt')} or {called('assistant_only_loss')} the"
        f" prompts probably fill {called('max_seq_length')}, {max_seq_length} tokens: raise it, shorten the prompts, or"
        " train on prompts too"
    )


def mean_loss(
    model: nn.Module,
    dataset: Any,
    loss: Callable[..., Any],
    iterate_batches: Callable[..., Any],
    args: Any,
    num_batches: int,
    before_batch: Callable[[int], None],
) -> float | None:
    """The mean loss over all targets of all workers; None without a target. Leaves the model in its ``eval`` mode.

    Args:
        model, dataset, loss, iterate_batches: as in `compiled_adam.train`.
        args: has ``batch_size`` and ``max_seq_length``, of all workers together, and ``clear_cache_threshold``.
        num_batches: the largest number of batches; -1 for all.
        before_batch: is called before each batch with its number, from 1; it may raise.
    """
    model.eval()
    world = join()
    sizes = {"batch_size": args.batch_size, "max_seq_length": args.max_seq_length}
    batches = iterate_batches(dataset=dataset, comm_group=world, **sizes)
    total, targets = 0.0, 0.0
    for number, batch in enumerate(islice(batches, None if num_batches == -1 else num_batches), start=1):
        before_batch(number)
        mean, count = loss(model, *batch_for(loss, batch))
        mx.eval(mean, count)
        # A batch, or a worker's part of one, may have no target: the mean of nothing may be 0/0, and must not count.
        if (weight := float(count)) > 0:
            total, targets = total + weight * mean.item(), targets + weight
        if args.clear_cache_threshold and mx.get_cache_memory() > args.clear_cache_threshold:
            mx.clear_cache()
    summed = mx.distributed.all_sum(mx.array([total, targets]), group=world, stream=mx.cpu)
    total, targets = cast(list[float], summed.tolist())
    return total / targets if targets else None


class Best(NamedTuple):
    """The lowest validation loss so far, its iteration, and the number of validations since then."""

    loss: float | None = None
    iteration: int | None = None
    stale: int = 0

    def after(self, iteration: int, loss: float) -> Best:
        """The same after one more validation.

        >>> Best().after(1, 2.0).after(3, math.nan)
        Best(loss=2.0, iteration=1, stale=1)
        """
        if math.isfinite(loss) and (self.loss is None or loss < self.loss):
            return Best(loss, iteration)
        return self._replace(stale=self.stale + 1)


class Interrupted(Exception):
    """Raised in the middle of a validation, which may take minutes, when the run is asked to end."""


@dataclass(eq=False)
class Validation:
    """The validations of a run, each with ``args.val_batches`` batches; none without a data set."""

    dataset: Any
    loss: Callable[..., Any]
    iterate_batches: Callable[..., Any]
    args: TrainingArgs
    workers: Workers
    asked: Asked
    progress: TrainingProgress

    def is_due(self, iteration: int) -> bool:
        """Whether there is a validation before the step of ``iteration``: the first, the last, each steps_per_eval."""
        regular = iteration == 1 or iteration % self.args.steps_per_eval == 0
        return bool(self.dataset) and (regular or iteration == self.args.iters)

    def measure(self, model: nn.Module, iteration: int) -> float | None:
        """`mean_loss`, after which the model trains on. Raises `Interrupted` if the run is asked to end."""
        args, batches, random = self.args, self.iterate_batches, np.random.get_state()
        whole = len(self.dataset) // args.batch_size
        count = whole if args.val_batches == -1 else min(whole, args.val_batches)
        before = partial(self._before_batch, count)
        try:
            loss = mean_loss(model, self.dataset, self.loss, batches, args, args.val_batches, before)
        finally:
            self.progress.doing = ""
        model.train()
        if iteration != 1 and iteration % args.steps_per_eval:
            # Made only because the run ends here; if more iterations follow, they are those of a longer run.
            np.random.set_state(random)
        return loss

    def _before_batch(self, count: int, number: int) -> None:
        self.progress.doing = f"validating {number}/{count}"
        if self.asked.signal is not None and not self.workers.many:
            raise Interrupted
        self.workers.beat()
