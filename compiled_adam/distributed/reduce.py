"""Sums over all workers of a group, packed into few calls: what makes N workers one big batch.

Each worker has sums over its own part of the batch: of weighted gradients, of weights and of losses. Their sums over
the workers are those of the whole batch. If all of it is at most sixteen times `LIMIT`, as it is with adapters, it is
communicated in one call. Otherwise leaves are packed, in their order, into buffers of at most `LIMIT` bytes, and a
larger leaf goes alone, as it is. In float32 a few scalars ride in the first buffer. Half precision could not hold them,
nor the weighted sums: then the scalars are summed first, and the buffers carry each worker's part of the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

import mlx.core as mx

from ..update import window

LIMIT = 32 * 2**20  # bytes; what MLX's own average_gradients packs
AT_ONCE = 16  # times the limit
SCALARS = 3  # weight, loss and extra
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "param": None}


class Buffer(NamedTuple):
    """One call of all_sum."""

    leaves: tuple[int, ...]  # indices
    scalars: int  # float32 numbers before them
    size: int  # elements
    nbytes: int


class Sums(NamedTuple):
    """What all workers know after a reduction."""

    means: list[mx.array]  # weighted mean gradients, in float32 or in what they were communicated in
    weight: mx.array
    loss: mx.array  # sum of weighted losses
    extra: mx.array
    last: mx.array  # what the last call returned: the next one must come after it


def buffers(sizes: Sequence[int], dtypes: Sequence[mx.Dtype], limit: int = LIMIT) -> list[Buffer]:
    """The calls of `mean_over_workers` for leaves of so many elements, communicated in these dtypes, in order.

    >>> [(b.leaves, b.nbytes) for b in buffers([3, 2, 100, 5], [mx.float32] * 4, limit=26)]
    [((0,), 24), ((1,), 8), ((2,), 400), ((3,), 20)]
    >>> [(b.leaves, b.nbytes) for b in buffers([3, 2, 100, 5], [mx.float32] * 4, limit=32)]
    [((0, 1, 2, 3), 452)]
    """
    total = 4 * SCALARS + sum(size * dtype.size for size, dtype in zip(sizes, dtypes, strict=True))
    if total <= AT_ONCE * limit:
        limit = total
    rides = all(dtype == mx.float32 for dtype in dtypes)
    packed: list[tuple[list[int], int, mx.Dtype]] = [([], SCALARS, mx.float32)]
    for i, (size, dtype) in enumerate(zip(sizes, dtypes, strict=True)):
        leaves, total, its_dtype = packed[-1]
        if (rides or len(packed) > 1) and dtype == its_dtype and (total + size) * dtype.size <= limit:
            packed[-1] = ([*leaves, i], total + size, dtype)
        else:
            packed.append(([i], size, dtype))
    return [
        Buffer(tuple(leaves), 0 if i else SCALARS, total, total * dtype.size)
        for i, (leaves, total, dtype) in enumerate(packed)
    ]


def mean_over_workers(
    gradients: Sequence[mx.array],
    scalars: Sequence[mx.array],
    group: mx.distributed.Group,
    dtypes: Sequence[mx.Dtype],
    weight: mx.array | None = None,
    limit: int = LIMIT,
) -> Sums:
    """The weighted mean over all workers of what each has for its part of the batch.

    Args:
        gradients: sums of weighted gradients, as `window.add` makes them; with ``weight`` gradients to be weighted.
        scalars: 0-d; the sums of weights and of weighted losses, and any number more.
        group: the workers. All must call this with leaves of the same shapes.
        dtypes: what each leaf is communicated in.
        weight: 0-d, of the gradients. Default None: they are weighted already.
        limit: bytes of a buffer.
    """
    first, *others = buffers([g.size for g in gradients], dtypes, limit)
    head = mx.stack([scalar.astype(mx.float32) for scalar in scalars])
    means: list[mx.array] = list(gradients)

    def mine(leaves: Sequence[int]) -> mx.array:
        """Weighted after they were packed: one kernel instead of one for each leaf."""
        flat = _flat([gradients[i] for i in leaves])
        return flat if weight is None else window.weighted(flat, weight)

    def headed(leaves: Sequence[int]) -> mx.array:
        """The same after the scalars, for which room is left at once, so that nothing is copied twice."""
        if weight is None:
            return _flat([head, *(gradients[i] for i in leaves)])
        room = mx.zeros(SCALARS, gradients[leaves[0]].dtype)
        flat = window.weighted(_flat([room, *(gradients[i] for i in leaves)]), weight)
        return mx.slice_update(flat, head, mx.array([0]), axes=(0,))

    def unpack(leaves: Sequence[int], flat: mx.array) -> None:
        for i, mean in zip(leaves, _split(flat, [gradients[i] for i in leaves]), strict=True):
            means[i] = mean

    # Calls are chained: workers must meet in the same call, and a graph alone does not say in which order they come.
    before = mx.distributed.all_sum(headed(first.leaves) if first.leaves else head, group=group)
    head = before[:SCALARS]
    total = mx.where(head[0] > 0, head[0], 1.0)
    if first.leaves:
        unpack(first.leaves, before[SCALARS:] / total)
    rides = all(dtype == mx.float32 for dtype in dtypes)
    for buffer in others:
        flat = mine(buffer.leaves) if rides else (mine(buffer.leaves) / total).astype(dtypes[buffer.leaves[0]])
        before = mx.distributed.all_sum(mx.depends(flat, before), group=group)
        unpack(buffer.leaves, before / total if rides else before)
    return Sums(means, head[0], head[1], head[2], before)


def sum_arrays(arrays: Sequence[mx.array], group: mx.distributed.Group, limit: int = LIMIT) -> list[mx.array]:
    """Each array summed over all workers, packed likewise; of one dtype. Evaluates them, a buffer at a time."""
    summed: list[mx.array] = []
    for some in packed(arrays, [a.nbytes for a in arrays], limit):
        summed += _split(mx.distributed.all_sum(_flat(some), group=group), some)
        mx.eval(summed)
    return summed


Item = TypeVar("Item")


def packed(items: Sequence[Item], nbytes: Iterable[int], limit: int = LIMIT) -> Iterator[list[Item]]:
    """Groups of items that have at most ``limit`` bytes together, in their order; a larger one is alone.

    >>> list(packed("abcd", [3, 2, 9, 1], limit=5))
    [['a', 'b'], ['c'], ['d']]
    """
    some: list[Item] = []
    total = 0
    for item, its in zip(items, nbytes, strict=True):
        if some and total + its > limit:
            yield some
            some, total = [], 0
        some.append(item)
        total += its
    if some:
        yield some


def _flat(arrays: Sequence[mx.array]) -> mx.array:
    return arrays[0].reshape(-1) if len(arrays) == 1 else mx.concatenate([a.reshape(-1) for a in arrays])


def _split(flat: mx.array, like: Sequence[mx.array]) -> list[mx.array]:
    ends = list(accumulate(array.size for array in like))
    return [piece.reshape(array.shape) for piece, array in zip(mx.split(flat, ends[:-1]), like, strict=True)]
