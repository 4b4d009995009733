"""The global norm of the gradients, and the factor that clips the gradients to a largest norm."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import mlx.core as mx


def global_norm(gradients: Sequence[mx.array], streams: Sequence[mx.Stream] | None = None) -> mx.array:
    """The Euclidean norm over all gradients together, in float32: a 0-d array, 0 for an empty list.

    ``streams``, if given, has a stream for the sum of squares of each gradient.

    >>> global_norm([mx.array([3.0]), mx.array(4.0, mx.float16)]).item()
    5.0
    """
    # Without `abs` MLX would share the cast of the gradient with the update, and so write the cast to memory.
    squares = []
    for i, g in enumerate(gradients):
        with mx.stream(streams[i]) if streams else contextlib.nullcontext():
            squares.append(_sum(mx.square(mx.abs(g).astype(mx.float32))))
    return mx.sqrt(mx.stack(squares).sum()) if squares else mx.array(0.0)


def _sum(x: mx.array, width: int = 4096) -> mx.array:
    """The sum over all elements. On the CPU MLX adds one after the other: a sum of ten million is 0.7 % too small.

    So on the CPU long arrays are first summed in ``width`` columns, and then over the columns. A GPU sums in a tree.
    """
    if x.size <= 4 * width or mx.default_device().type != mx.DeviceType.cpu:
        return x.sum()
    flat, cut = x.reshape(-1), x.size // width * width
    total = flat[:cut].reshape(-1, width).sum(axis=0).sum()
    return total + flat[cut:].sum() if cut < x.size else total


def clip_factor(norm: mx.array, max_norm: float) -> mx.array:
    """The factor (at most 1) that scales gradients of global norm ``norm`` to a norm of at most ``max_norm``.

    >>> clip_factor(mx.array(4.0), 1.0).item(), clip_factor(mx.array(0.0), 1.0).item()
    (0.25, 1.0)
    """
    return max_norm / mx.maximum(norm, max_norm)
