"""The window: the weighted sums of accumulated gradients in float32, as pure functions of arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

Window = tuple[list[mx.array], mx.array, mx.array]  # sums of gradients, of weights and of losses


def empty(parameters: Sequence[mx.array]) -> Window:
    """An empty window, for parameters of these shapes."""
    return [mx.zeros(p.shape, _summed(p.dtype)) for p in parameters], mx.array(0.0), mx.array(0.0)


def weighted(x: mx.array, weight: mx.array) -> mx.array:
    """``weight * x`` in float32. It is 0 for a weight of 0, even if ``x`` is NaN."""
    return counted(weight * x.astype(_summed(x.dtype)), weight)


def counted(x: mx.array, weight: mx.array) -> mx.array:
    """``x``, or 0 for a weight of 0. Not a product: a batch without tokens has the loss 0/0, and 0 * NaN is NaN."""
    return mx.where(weight > 0, x, mx.zeros((), x.dtype))


def _summed(dtype: mx.Dtype) -> mx.Dtype:
    """The dtype in which values of ``dtype`` are summed."""
    return mx.complex64 if dtype == mx.complex64 else mx.float32


def add(window: Window, gradients: Sequence[mx.array], weight: mx.array, loss: mx.array) -> Window:
    """The window with one more micro-batch."""
    totals, total_weight, total_loss = window
    totals = [total + weighted(g, weight) for total, g in zip(totals, gradients, strict=True)]
    return totals, total_weight + mx.maximum(weight, 0.0), total_loss + weighted(loss, weight)


def mean(sums: Sequence[mx.array], weight: mx.array, dtypes: Sequence[mx.Dtype]) -> list[mx.array]:
    """The mean gradients, rounded once to the dtype that the gradient of one big batch would have."""
    weight = mx.where(weight > 0, weight, 1.0)  # 0 / 0 gives 0 here
    return [(g / weight).astype(dtype) for g, dtype in zip(sums, dtypes, strict=True)]


def to_dict(window: Window, paths: Sequence[str], batches: int) -> dict[str, mx.array]:
    """A window of ``batches`` micro-batches as arrays by name. The inverse of `from_dict`."""
    sums, weight, loss = window
    named = {f"gradients.{path}": total for path, total in zip(paths, sums, strict=True)}
    return named | {"weight": weight, "loss": loss, "batches": mx.array(batches)}


def from_dict(arrays: Mapping[str, mx.array], paths: Sequence[str]) -> Window:
    """The window from the arrays that `to_dict` returned."""
    return [arrays[f"gradients.{path}"] for path in paths], arrays["weight"], arrays["loss"]
