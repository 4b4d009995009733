"""Which small leaves (parameter arrays) are packed into flat arrays, and how.

Leaves of up to `SMALL` elements are packed, because starting a kernel for one costs more than its loop. A flat array
has leaves of the same dtype, group and form. It has up to `FULL` elements, so that it fits into a core's cache with the
moments, and up to `MANY` leaves. Leaves whose moments are rounded stochastically are not packed: each has a random key.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import NamedTuple

import mlx.core as mx

from .groups import Group
from .leaves import Form

SMALL = 1 << 16
FULL = 1 << 18
MANY = 256


class Leaf(NamedTuple):
    """The properties of a parameter that decide with which others it can be packed."""

    size: int
    dtype: mx.Dtype
    group: Group
    form: Form


def packs(leaves: Sequence[Leaf], small: int = SMALL, full: int = FULL) -> list[tuple[int, ...]]:
    """The indices of the leaves of each flat array (at least two per array), in the order of the leaves.

    >>> leaf = Leaf(3, mx.float32, Group(), Form("float32", False, False))
    >>> packs([leaf, leaf._replace(dtype=mx.bfloat16), leaf, leaf, leaf._replace(size=9), leaf], small=8, full=7)
    [(0, 2), (3, 5)]
    """
    found: list[list[int]] = []
    last: dict[Hashable, tuple[list[int], int]] = {}  # the pack that is being filled, and how many elements it has
    for i, leaf in enumerate(leaves):
        if leaf.size > small or leaf.form.stochastic:
            continue
        kind = leaf.dtype, leaf.group, leaf.form
        pack, filled = last.get(kind, ([], full))
        if filled + leaf.size > full or len(pack) == MANY:
            pack, filled = [], 0
            found.append(pack)
        pack.append(i)
        last[kind] = pack, filled + leaf.size
    return [tuple(pack) for pack in found if len(pack) > 1]


def flat(arrays: Sequence[mx.array]) -> mx.array:
    """All elements in memory order, as one array. It keeps the shape of the rows if all arrays have the same."""
    if len(arrays) == 1:
        return arrays[0]
    rows = arrays[0].shape[1:]
    if all(array.ndim and array.shape[1:] == rows for array in arrays):
        return mx.concatenate(list(arrays))  # saves a task per array that flattens it
    return mx.concatenate([array.flatten() for array in arrays])


def apart(array: mx.array, shapes: Sequence[tuple[int, ...]]) -> list[mx.array]:
    """Arrays of these ``shapes`` from the array that `flat` has made of them.

    >>> [part.shape for part in apart(flat([mx.zeros((2, 3)), mx.zeros(4)]), [(2, 3), (4,)])]
    [(2, 3), (4,)]
    """
    if len(shapes) == 1:
        return [array]
    ends = list(accumulate(math.prod(shape) for shape in shapes))
    parts = mx.split(array.flatten(), ends[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous array, in elements."""
    return tuple(accumulate(reversed(shape[1:]), operator.mul, initial=1))[::-1] if shape else ()
