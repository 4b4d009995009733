"""The cross entropy of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """``logsumexp(logits) - logits[target]`` over the last axis, in float32 for every dtype of ``logits``."""
    fused = getattr(mx.fast, "cross_entropy", None)
    if fused is not None and mx.default_device() == mx.gpu:
        return fused(logits, targets)  # a kernel with float32 inside; a float32 copy of the logits would be large
    return nn.losses.cross_entropy(logits.astype(mx.float32), targets)


def kept_cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """`cross_entropy`, for a gradient that is computed right away: it keeps the exponentials for it.

    On a CPU exponentials take most of the time, and MLX's own gradient computes them twice and needs three times the
    memory. ``logits`` are (rows, vocabulary). A row whose loss does not count has the gradient 0, whatever its logits.
    """
    if mx.default_device() == mx.gpu:
        losses: mx.array = _counted(logits, targets)
        return losses
    kept: Any = _kept(logits, targets)
    return kept[0]


def kept(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The losses, the exponentials, and their sums."""
    wide = logits.astype(mx.float32)
    top = wide.max(axis=-1, keepdims=True)
    powers = mx.exp(wide - top)
    total = powers.sum(axis=-1, keepdims=True)
    losses = mx.log(total) + top - mx.take_along_axis(wide, targets[:, None], axis=-1)
    return losses[:, 0], powers, total


def kept_gradient(
    inputs: tuple[mx.array, mx.array], cotangents: Sequence[mx.array], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, mx.array]:
    """The gradients with respect to the inputs of `kept`, by that of the losses."""
    (logits, targets), (_, powers, total), factor = inputs, outputs, cotangents[0][:, None]
    hit = mx.arange(logits.shape[-1]) == targets[:, None]
    gradient = powers * (factor / total) - mx.where(hit, factor, 0.0)
    return mx.where(factor == 0, 0.0, gradient).astype(logits.dtype), mx.zeros_like(targets)


def _counted_gradient(inputs: Sequence[mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    """MLX's gradient of `cross_entropy`, but 0 and never NaN for a row that does not count."""
    logits, targets = inputs
    _, (gradient,) = mx.vjp(lambda logits: cross_entropy(logits, targets), [logits], [cotangent])
    return mx.where(cotangent[:, None] == 0, 0.0, gradient).astype(logits.dtype), mx.zeros_like(targets)


_counted: Any = mx.custom_function(cross_entropy)
_counted.vjp(_counted_gradient)
_kept = mx.custom_function(kept)
_kept.vjp(kept_gradient)
