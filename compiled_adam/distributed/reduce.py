"""Sums over all workers of a group, packed into few calls, so that N workers train like one worker with a big batch.

Each worker has sums over one part of the batch: of weighted gradients, of weights and of losses. Adding them over the
workers gives the sums of the whole batch. If all arrays have at most sixteen times `LIMIT` bytes, as adapters do, one
call communicates all. Otherwise the leaves (arrays) are packed, in order, into buffers of at most `LIMIT` bytes. A
larger leaf is sent alone. In float32 the first buffer also carries a few scalars. Half precision could hold neither
the scalars nor the weighted sums. Then the scalars are summed first, and the buffers carry each worker's part of the
mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

import mlx.core as mx

from ..update import window

LIMIT = 32 * 2**20  # bytes of a buffer, as in MLX's own average_gradients
AT_ONCE = 16  # up to so many times `LIMIT`, one call sends all
SCALARS = 3  # weight, loss and extra
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "param": None}


class Buffer(NamedTuple):
    """The content of one call of all_sum."""

    leaves: tuple[int, ...]  # indices of the leaves
    nbytes: int


class Sums(NamedTuple):
    """The results of a reduction, the same on all workers."""

    means: list[mx.array]  # weighted mean gradients, in float32 or in the dtype of the communication
    weight: mx.array  # sum of weights
    loss: mx.array  # sum of weighted losses
    extra: mx.array  # sum of `extra`
    last: mx.array  # the result of the last call: the next communication must depend on it


def buffers(sizes: Sequence[int], dtypes: Sequence[mx.Dtype], limit: int = LIMIT) -> list[Buffer]:
    """The calls of `mean_over_workers`, in order. ``sizes`` and ``dtypes`` describe the leaves as they are sent.

    >>> [(b.leaves, b.nbytes) for b in buffers([3, 2, 100, 5], [mx.float32] * 4, limit=26)]
    [((0,), 24), ((1,), 8), ((2,), 400), ((3,), 20)]
    >>> [(b.leaves, b.nbytes) for b in buffers([3, 2, 100, 5], [mx.float32] * 4, limit=32)]
    [((0, 1, 2, 3), 452)]
    """
    total = 4 * SCALARS + sum(size * dtype.size for size, dtype in zip(sizes, dtypes, strict=True))
    if total <= AT_ONCE * limit:
        limit = total
    rides = all(dtype == mx.float32 for dtype in dtypes)
    calls: list[tuple[list[int], int, mx.Dtype]] = [([], SCALARS, mx.float32)]
    for i, (size, dtype) in enumerate(zip(sizes, dtypes, strict=True)):
        leaves, total, its_dtype = calls[-1]
        if (rides or len(calls) > 1) and dtype == its_dtype and (total + size) * dtype.size <= limit:
            calls[-1] = ([*leaves, i], total + size, dtype)
        else:
            calls.append(([i], size, dtype))
    return [Buffer(tuple(leaves), total * dtype.size) for leaves, total, dtype in calls]


def mean_over_workers(
    gradients: Sequence[mx.array],
    scalars: Sequence[mx.array],
    group: mx.distributed.Group,
    dtypes: Sequence[mx.Dtype],
    weight: mx.array | None = None,
    limit: int = LIMIT,
) -> Sums:
    """The weighted mean gradients over all workers, each of which has the gradients of one part of the batch.

    Args:
        gradients: sums of weighted gradients, as `window.add` makes them, or with ``weight`` unweighted gradients.
        scalars: three 0-d arrays: the sum of weights, the sum of weighted losses, and any other number to sum.
        group: the workers. All must call this function with leaves of the same shapes.
        dtypes: the dtype in which each leaf is communicated.
        weight: 0-d weight of the gradients. Default None: they are already weighted.
        limit: largest number of bytes of a buffer.
    """
    first, *others = buffers([g.size for g in gradients], dtypes, limit)
    head = mx.stack([scalar.astype(mx.float32) for scalar in scalars])
    means: list[mx.array] = list(gradients)

    def mine(leaves: Sequence[int]) -> mx.array:
        """Packs the leaves and then weights them: one kernel instead of one for each leaf."""
        flat = joined([gradients[i] for i in leaves])
        return flat if weight is None else window.weighted(flat, weight)

    def headed(leaves: Sequence[int]) -> mx.array:
        """The scalars and the packed leaves. Packing leaves room for the scalars, so that no array is copied twice."""
        if weight is None:
            return joined([head, *(gradients[i] for i in leaves)])
        room = mx.zeros(SCALARS, gradients[leaves[0]].dtype)
        flat = window.weighted(joined([room, *(gradients[i] for i in leaves)]), weight)
        return mx.slice_update(flat, head, mx.array([0]), axes=(0,))

    def unpack(leaves: Sequence[int], flat: mx.array) -> None:
        for i, mean in zip(leaves, _split(flat, [gradients[i] for i in leaves]), strict=True):
            means[i] = mean

    # Each call depends on the one before: workers must make the calls in the same order, which a graph does not fix.
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


def sum_arrays(arrays: Sequence[mx.array], group: mx.distributed.Group) -> list[mx.array]:
    """Each array summed over all workers. All have the same dtype. Evaluates the sums, a buffer at a time."""
    summed: list[mx.array] = []
    for some in packed(arrays, [a.nbytes for a in arrays]):
        summed += _split(mx.distributed.all_sum(joined(some), group=group), some)
        mx.eval(summed)
    return summed


Item = TypeVar("Item")


def packed(items: Sequence[Item], nbytes: Iterable[int], limit: int = LIMIT) -> Iterator[list[Item]]:
    """Divides items, in order, into groups of at most ``limit`` bytes. A larger item is a group of one.

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


def joined(arrays: Sequence[mx.array]) -> mx.array:
    """All elements of the arrays, one array after the other."""
    return arrays[0].reshape(-1) if len(arrays) == 1 else mx.concatenate([a.reshape(-1) for a in arrays])


def _split(flat: mx.array, like: Sequence[mx.array]) -> list[mx.array]:
    ends = list(accumulate(array.size for array in like))
    return [piece.reshape(array.shape) for piece, array in zip(mx.split(flat, ends[:-1]), like, strict=True)]
