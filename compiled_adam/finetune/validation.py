"""The mean loss over a data set, by mlx-lm's rule, each worker with its part of every batch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..distributed import join


def no_targets(max_seq_length: int) -> str:
    """Why batches have no target, in all likelihood, and what to do; to be put after what follows from it."""
    return (
        "no example has a token to predict. With mask_prompt (--mask-prompt) the prompts probably fill max_seq_length"
        f" (--max-seq-length), {max_seq_length} tokens: raise it, shorten the prompts, or train on prompts too"
    )


def mean_loss(
    model: nn.Module,
    dataset: Any,
    loss: Callable[..., Any],
    before_batch: Callable[[], None],
    clear_cache_threshold: int = 0,
    *,
    batch_size: int,
    num_batches: int,
    max_seq_length: int,
    iterate_batches: Callable[..., Any],
) -> float | None:
    """The mean over all targets, of all workers; None if there is none. Leaves the model in its ``eval`` mode.

    Args:
        model, dataset, loss, iterate_batches: as in `compiled_adam.train`.
        before_batch: is called before each batch; it may raise.
        clear_cache_threshold: clear the allocator's cache when it has more bytes. Default 0: never.
        batch_size, max_seq_length: of all workers together.
        num_batches: how many batches are measured at most; -1 for all.
    """
    model.eval()
    world = join()
    batches = iterate_batches(dataset=dataset, batch_size=batch_size, max_seq_length=max_seq_length, comm_group=world)
    total, targets = 0.0, 0.0
    for batch in islice(batches, None if num_batches == -1 else num_batches):
        before_batch()
        mean, count = loss(model, *batch)
        mx.eval(mean, count)
        # A batch, or a worker's part of one, may have no target: the mean of nothing may be 0/0, and must not count.
        if (weight := float(count)) > 0:
            total, targets = total + weight * mean.item(), targets + weight
        if clear_cache_threshold and mx.get_cache_memory() > clear_cache_threshold:
            mx.clear_cache()
    summed = mx.distributed.all_sum(mx.array([total, targets]), group=world, stream=mx.cpu)
    total, targets = cast(list[float], summed.tolist())
    return total / targets if targets else None
