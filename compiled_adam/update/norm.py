"""The global norm of the gradients, and the factor that clips them by it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import mlx.core as mx


def global_norm(gradients: Sequence[mx.array], streams: Sequence[mx.Stream] | None = None) -> mx.array:
    """The Euclidean norm over all gradients together, in float32: a 0-d array, 0 for an empty list.

    Each one's sum of squares is computed on its stream, if ``streams`` says which.

    >>> global_norm([mx.array([3.0]), mx.array(4.0, mx.float16)]).item()
    5.0
    """
    # Without `abs`, MLX would see that the update casts the gradient too, and write the cast out for both to share.
    squares = []
    for i, g in enumerate(gradients):
        with mx.stream(streams[i]) if streams else contextlib.nullcontext():
            squares.append(_sum(mx.square(mx.abs(g).astype(mx.float32))))
    return mx.sqrt(mx.stack(squares).sum()) if squares else mx.array(0.0)


def _sum(x: mx.array, width: int = 4096) -> mx.array:
    """The sum over all elements. On the CPU MLX adds them up one after the other: ten million come out 0.7 % too small.

    There long arrays are added up in ``width`` columns first, whose sums are then added; a GPU's reduction is a tree.
    """
    if x.size <= 4 * width or mx.default_device().type != mx.DeviceType.cpu:
        return x.sum()
    flat, cut = x.reshape(-1), x.size // width * width
    total = flat[:cut].reshape(-1, width).sum(axis=0).sum()
    return total + flat[cut:].sum() if cut < x.size else total


def clip_factor(norm: mx.array, max_norm: float) -> mx.array:
    """What gradients of global norm ``norm`` are multiplied by so that it is at most ``max_norm``: 1 or less.

    >>> clip_factor(mx.array(4.0), 1.0).item(), clip_factor(mx.array(0.0), 1.0).item()
    (0.25, 1.0)
    """
    return max_norm / mx.maximum(norm, max_norm)
