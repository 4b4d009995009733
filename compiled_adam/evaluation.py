"""The mean loss over a data set, by mlx-lm's own `evaluate`, each worker with its part of every batch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.trainer import evaluate


def mean_loss(
    model: nn.Module,
    dataset: Any,
    loss: Callable[..., Any],
    before_batch: Callable[[], None],
    clear_cache_threshold: int = 0,
    **options: Any,
) -> float:
    """The mean over all tokens, of all workers; ``before_batch`` may raise. Leaves the model in its ``eval`` mode.

    ``options`` are mlx-lm's: batch_size, num_batches, max_seq_length, iterate_batches.
    """

    def counted(*batch: Any) -> tuple[mx.array, Any]:
        before_batch()
        value, tokens = loss(*batch)
        # A worker's part may have no tokens (prompts that are masked, and cut): 0/0, of which the mean has nothing.
        return mx.where(mx.array(tokens) > 0, value, 0.0), tokens

    return evaluate(
        model=model,
        dataset=dataset,
        loss=counted,
        # evaluate's default clears the cache after each batch; this never does, or beyond the threshold.
        clear_cache_threshold=clear_cache_threshold or sys.maxsize,
        **options,
    )
