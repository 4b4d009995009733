"""The loss of a fine-tuning run, for which only the logits of a chunk of target tokens exist at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..step import losses
from .head import Parts, parts

# Parts of all rows of a batch. Each is another shape, and so another trace of the gradient.
_CAPACITIES = (0.125, 0.25, 0.375, 0.5, 0.75)


class ChunkedLoss:
    """`losses.next_token` by `losses.linear_cross_entropy`, for a ``model`` of mlx-lm.

    ``loss(model, tokens, lengths, rows)`` has one more argument, which `with_rows` makes of a batch: the indices of the
    target tokens, so that the head computes no others. Without it, the head computes all.

    Raises:
        ValueError: the ``model`` is not a backbone and a head. The message says why.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parts: Parts = parts(model)

    def __call__(
        self, model: nn.Module, tokens: mx.array, lengths: mx.array, rows: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        hidden, targets = self._parts.hidden(model, tokens[:, :-1]), tokens[:, 1:]
        if rows is None:
            counts = losses.trained_targets(tokens, lengths)
        else:
            counts, at = rows >= 0, mx.maximum(rows, 0)
            hidden, targets = hidden.reshape(-1, hidden.shape[-1])[at], targets.reshape(-1)[at]
        # Without a gradient, as in a validation, it is not computed ahead.
        return losses.linear_cross_entropy(hidden, self._parts.head(model), targets, counts, ahead=model.training)

    def with_rows(self, tokens: mx.array, lengths: mx.array, mask: mx.array | None = None) -> tuple[mx.array, ...]:
        """The batch, and the indices of its targets among all positions: int32, filled up to one of few sizes with -1.

        Where most tokens are targets, and no mask says which, the batch as it is.
        """
        # In NumPy, because MLX would wait for the step before. The same as `losses.trained_targets`.
        positions, ends = np.arange(1, tokens.shape[1]), np.array(lengths)
        trained = (positions >= ends[:, :1]) & (positions < ends[:, 1:])
        targets = np.flatnonzero(trained if mask is None else trained & np.array(mask)[:, 1:])
        every = trained.size
        capacity = next((size for part in _CAPACITIES if len(targets) <= (size := int(part * every))), every)
        if capacity == every and mask is None:
            return tokens, lengths
        rows = np.full(capacity, -1, np.int32)
        rows[: len(targets)] = targets
        return tokens, lengths, mx.array(rows)


def most_traces(loss: Callable[..., Any], shapes: int) -> int:
    """How many traces of the gradient batches of so many ``shapes`` need at most."""
    return shapes * (len(_CAPACITIES) + 1 if isinstance(loss, ChunkedLoss) else 1)


def batch_for(loss: Callable[..., Any], batch: Any) -> Any:
    """The arguments of ``loss`` after the model: the batch, and what the loss adds to it."""
    return loss.with_rows(*batch) if isinstance(loss, ChunkedLoss) else batch
