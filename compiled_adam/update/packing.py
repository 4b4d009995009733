"""Which small leaves (parameter arrays) are packed into flat arrays, and how.

Leaves of up to `SMALL` elements are packed, because starting a kernel for one costs more than its loop. A flat array
has leaves of the same dtype, row (the shape without the first axis), group and form. It has up to `FULL` elements, so
that it fits into a core's cache with the moments, and up to `MANY` leaves. Leaves whose moments are rounded
stochastically are not packed: each has a random key.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import NamedTuple

import mlx.core as mx

from .groups import Group
from .leaves import Form

SMALL = 1 << 16
TINY = 1 << 9
FULL = 1 << 18
MANY = 256
MOST_PARTS = 10


class Leaf(NamedTuple):
    """The properties of a parameter that decide with which others it can be packed."""

    size: int
    dtype: mx.Dtype
    row: tuple[int, ...] | None  # the shape without the first axis; None: the shape is ()
    group: Group
    form: Form

    @classmethod
    def of(cls, parameter: mx.array, group: Group, form: Form) -> Leaf:
        row = parameter.shape[1:] if parameter.ndim else None
        return cls(parameter.size, parameter.dtype, row, group, form)


def packs(leaves: Sequence[Leaf], small: int = SMALL, full: int = FULL) -> list[tuple[int, ...]]:
    """The indices of the leaves of each flat array (at least two per array), in the order of the leaves.

    >>> leaf = Leaf(3, mx.float32, (), Group(), Form("float32", False, False))
    >>> packs([leaf, leaf._replace(dtype=mx.bfloat16), leaf, leaf, leaf._replace(size=9), leaf], small=8, full=7)
    [(0, 2), (3, 5)]
    """
    found: list[list[int]] = []
    last: dict[Hashable, tuple[list[int], int]] = {}  # the pack that is being filled, and how many elements it has
    for i, leaf in enumerate(leaves):
        if leaf.size > small or leaf.form.stochastic:
            continue
        kind = leaf[1:]  # all but the size
        pack, filled = last.get(kind, ([], full))
        if filled + leaf.size > full or len(pack) == MANY:
            pack, filled = [], 0
            found.append(pack)
        pack.append(i)
        last[kind] = pack, filled + leaf.size
    return [tuple(pack) for pack in found if len(pack) > 1]


def flat(arrays: Sequence[mx.array]) -> mx.array:
    """Arrays whose shapes differ at most in the first axis, one after the other along that axis."""
    if len(arrays) == 1:
        return arrays[0]
    return mx.concatenate(list(arrays)) if arrays[0].ndim else mx.stack(list(arrays))


def apart(array: mx.array, shapes: Sequence[tuple[int, ...]]) -> list[mx.array]:
    """Arrays of these ``shapes`` from the array that `flat` has made of them.

    >>> [part.shape for part in apart(flat([mx.zeros((2, 3)), mx.zeros((1, 3))]), [(2, 3), (1, 3)])]
    [(2, 3), (1, 3)]
    """
    if len(shapes) == 1:
        return [array]
    if not shapes[0]:
        return [part.reshape(()) for part in _cut(array, [1] * len(shapes))]
    return _cut(array, [shape[0] for shape in shapes])


def _cut(array: mx.array, lengths: Sequence[int]) -> list[mx.array]:
    """Parts of these lengths along the first axis.

    MLX makes up to ten parts in one operation, and more parts in an operation each. The CPU needs 5 us for an
    operation. So the array is cut into ten at most, each part again, and so on.
    """
    size = 1
    while size * MOST_PARTS < len(lengths):
        size *= MOST_PARTS
    groups = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    parts = list(mx.split(array, list(accumulate(map(sum, groups)))[:-1]))
    if size == 1:
        return parts
    return [part for whole, group in zip(parts, groups, strict=True) for part in _cut(whole, group)]
