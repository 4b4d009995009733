"""The global norm of the gradients, and the factor that clips the gradients to a largest norm."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import mlx.core as mx

PARTS = 8
COLUMNS = 1024


def global_norm(gradients: Sequence[mx.array], streams: Sequence[mx.Stream] | None = None) -> mx.array:
    """The Euclidean norm over all gradients together, in float32: a 0-d array, 0 for an empty list.

    ``streams``, if given, has a stream for the sum of squares of each gradient.

    >>> global_norm([mx.array([3.0]), mx.array(4.0, mx.float16)]).item()
    5.0
    """
    squares = []
    for i, g in enumerate(gradients):
        with mx.stream(streams[i]) if streams else contextlib.nullcontext():
            squares.append(sum_of_squares(g))
    return norm_of(squares)


def norm_of(squares: list[mx.array]) -> mx.array:
    """The global norm from the `sum_of_squares` of each gradient."""
    return mx.sqrt(mx.stack(squares).sum()) if squares else mx.array(0.0)


def sum_of_squares(x: mx.array) -> mx.array:
    """The sum of the squares of all elements, float32.

    On the CPU MLX writes the squares to memory before it sums them, which takes longer than the update. It also adds
    one after the other, so a sum of ten million is 0.7 % too small. So there one kernel squares the eight parts of a
    long array and adds them, which leaves an eighth to write, and that is summed in columns first. g++ vectorizes a
    loop over eight arrays, but none over sixteen. A GPU sums in a tree.
    """
    cut = x.size // (PARTS * COLUMNS) * (PARTS * COLUMNS)
    if cut == 0 or mx.default_device().type != mx.DeviceType.cpu:
        # Without `abs` MLX would share the cast of the gradient with the update, and so write the cast to memory.
        return _square(mx.abs(x)).sum()
    flat = x.reshape(-1)
    terms = [_square(part) for part in mx.split(flat[:cut], PARTS)]
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    total = terms[0].reshape(-1, COLUMNS).sum(axis=0).sum()
    return total + _square(flat[cut:]).sum() if cut < x.size else total


def _square(x: mx.array) -> mx.array:
    return mx.square(x.astype(mx.float32))


def clip_factor(norm: mx.array, max_norm: float) -> mx.array:
    """The factor (at most 1) that scales gradients of global norm ``norm`` to a norm of at most ``max_norm``.

    >>> clip_factor(mx.array(4.0), 1.0).item(), clip_factor(mx.array(0.0), 1.0).item()
    (0.25, 1.0)
    """
    return max_norm / mx.maximum(norm, max_norm)
