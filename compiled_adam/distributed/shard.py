"""Sharded optimizer state: each worker of a group keeps the state of some parameters, and updates only those.

The shard of a worker is the set of these parameters. Every worker knows the mean gradient of all parameters (see
`reduce`), and so the global norm, and clips and skips like the others. It updates the parameters of the shard. Then the
workers exchange the new weights. No parameter is split. So an update that treats each parameter separately gives the
same bits as without sharding.

Source: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models", SC 2020, stage 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

from ..base import InputError, along, indexed
from ..optimizers import Adam, Compensated, ForSteps, any_optimizer
from ..update import Part
from . import workers
from .reduce import AT_ONCE, LIMIT


def owners(sizes: Sequence[int], count: int) -> list[int]:
    """The owner among ``count`` workers of each leaf. ``sizes`` has the elements of the leaves.

    The largest leaf first, each goes to the worker with the fewest elements so far. So no worker has more than an even
    share plus one leaf.

    >>> owners([4, 1, 3, 2], 2)
    [0, 0, 1, 1]
    """
    loads, found = [0] * count, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        found[i] = loads.index(min(loads))
        loads[found[i]] += sizes[i]
    return found


class Round(NamedTuple):
    """The content of one call of all_gather."""

    leaves: tuple[tuple[int, ...], ...]  # for each worker the indices of the leaves
    length: int  # elements that each worker sends, with padding at the end
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        """The bytes of all workers together."""
        return len(self.leaves) * self.length * self.dtype.size


def rounds(sizes: Sequence[int], dtypes: Sequence[mx.Dtype], count: int, limit: int = LIMIT) -> list[Round]:
    """The calls in which ``count`` workers exchange leaves. Each worker sends the leaves that it owns.

    A call has leaves of one dtype. If all leaves have at most sixteen times ``limit`` bytes, there is one call per
    dtype. Otherwise a call has at most ``limit`` bytes, or one leaf of each worker if these are larger.

    >>> [(each.leaves, each.nbytes) for each in rounds([4, 1, 3, 2], [mx.float32] * 4, 2)]
    [(((0, 1), (2, 3)), 40)]
    >>> [(each.leaves, each.nbytes) for each in rounds([4, 1, 3, 2], [mx.float32] * 4, 2, limit=1)]
    [(((0,), (2,)), 32), (((1,), (3,)), 16)]
    """
    if sum(size * dtype.size for size, dtype in zip(sizes, dtypes, strict=True)) <= AT_ONCE * limit:
        limit = sum(sizes) * count * max((dtype.size for dtype in dtypes), default=1)
    owned = owners(sizes, count)
    found = []
    for dtype in dict.fromkeys(dtypes):
        # The largest first, so that all workers send about the same number of elements in a call.
        order = sorted((i for i, its in enumerate(dtypes) if its == dtype and sizes[i]), key=lambda i: -sizes[i])
        waiting = [[i for i in order if owned[i] == worker] for worker in range(count)]
        while any(waiting):
            capacity = max(limit // (count * dtype.size), *(sizes[mine[0]] if mine else 0 for mine in waiting))
            taken = tuple(_fitting(mine, sizes, capacity) for mine in waiting)
            length = max(sum(sizes[i] for i in mine) for mine in taken)
            found.append(Round(taken, length, dtype))
            waiting = [[i for i in mine if i not in its] for mine, its in zip(waiting, map(set, taken), strict=True)]
    return found


def _fitting(leaves: Sequence[int], sizes: Sequence[int], capacity: int) -> tuple[int, ...]:
    taken = []
    for i in leaves:
        if sizes[i] <= capacity:
            taken.append(i)
            capacity -= sizes[i]
    return tuple(taken)


def gathered(
    mine: Mapping[int, mx.array],
    weights: Sequence[mx.array],
    calls: Sequence[Round],
    group: mx.distributed.Group,
    after: mx.array,
) -> list[mx.array]:
    """All new ``weights``. Each worker sends the weights in ``mine``, after the communication that gave ``after``."""
    found = list(weights)
    for call in calls:
        pieces = [mine[i].reshape(-1) for i in call.leaves[group.rank()]]
        if padding := call.length - sum(piece.size for piece in pieces):
            pieces.append(mx.zeros(padding, call.dtype))
        flat = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)
        # Each call depends on the one before, as in `reduce`: all workers must make the calls in the same order.
        after = mx.distributed.all_gather(mx.depends(flat, after), group=group)
        places: list[int] = []  # the index of the leaf that begins at each cut
        cuts: list[int] = []
        for worker, leaves in enumerate(call.leaves):
            at = worker * call.length
            for i in leaves:
                places.append(i)
                cuts.append(at)
                at += weights[i].size
            if at < (worker + 1) * call.length:
                places.append(-1)  # padding
                cuts.append(at)
        for i, piece in zip(places, mx.split(after, cuts[1:]), strict=True):
            if i >= 0:
                found[i] = piece.reshape(weights[i].shape)
    return found


class Shard:
    """The parameters whose optimizer state this worker keeps.

    Args:
        trainable: the tree of parameters.
        paths: the paths of the parameters, in the order of the updates.
        sizes: the number of elements of each parameter.
        dtypes: the dtype of each parameter.
        group: the workers. All must make a `Shard` with the same arguments.
    """

    def __init__(
        self,
        trainable: Any,
        paths: Sequence[str],
        sizes: Sequence[int],
        dtypes: Sequence[mx.Dtype],
        group: mx.distributed.Group,
    ) -> None:
        self._group = group
        owned = owners(sizes, group.size())
        self._own = tuple(i for i, owner in enumerate(owned) if owner == group.rank())
        self._template = indexed(trainable, {paths[i]: i for i in self._own})
        self._others = {path for path, owner in zip(paths, owned, strict=True) if owner != group.rank()}
        self._rounds = rounds(sizes, dtypes, group.size())

    def has(self, path: str) -> bool:
        """Whether this worker keeps the array at a path of the state. Arrays that belong to no parameter are on all."""
        return path.rpartition(".")[0] not in self._others

    def own(self, state: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The part of a flat state that this worker keeps."""
        return {path: array for path, array in state.items() if self.has(path)}

    def init(self, optimizer: optim.Optimizer, parameters: Any) -> None:
        """Creates missing state of the parameters of this shard. Drops the state of all other parameters."""
        state = any_optimizer.flat_state(optimizer)
        if len(own := self.own(state)) < len(state):
            optimizer.state = any_optimizer.arranged(optimizer.state, own)[0]
        mine = tree_map(lambda _, parameter: parameter, self._template, parameters)
        if isinstance(optimizer, Adam):
            ForSteps(optimizer).kept.init_part(mine, parameters)
        else:
            optimizer.init(mine)

    def update(
        self,
        optimizer: optim.Optimizer,
        gradients: Sequence[mx.array],
        weights: Sequence[mx.array],
        norm: mx.array,
        after: mx.array,
    ) -> list[mx.array]:
        """All new weights, from all gradients and their global ``norm``. ``after`` is as in `gathered`."""
        mine = tree_map(lambda i: gradients[i], self._template)
        parameters = tree_map(lambda i: weights[i], self._template)
        if isinstance(optimizer, Adam):
            updated = ForSteps(optimizer).apply_part(mine, parameters, Part(norm, self._own, len(weights)))
        elif isinstance(optimizer, Compensated):
            updated = optimizer.apply_part(mine, parameters, norm)
        else:
            updated = optimizer.apply_gradients(mine, parameters)
        leaves = [container[key] for _, container, key in along(self._template, updated)]
        return gathered(dict(zip(self._own, leaves, strict=True)), weights, self._rounds, self._group, after)


def check(optimizer: optim.Optimizer) -> None:
    """Raises ValueError if one parameter's update by the optimizer may need the gradients of others."""
    if isinstance(optimizer, Compensated):
        optimizer = optimizer.wrapped
    if type(optimizer).apply_gradients not in (Adam.apply_gradients, optim.Optimizer.apply_gradients):
        raise InputError(
            f"shard_state=True needs an optimizer that updates each parameter by itself, but"
            f" {type(optimizer).__name__} has an apply_gradients of its own; use compiled_adam's Adam or AdamW, which"
            " have groups, or shard_state=False"
        )


def complete(optimizer: optim.Optimizer, group: mx.distributed.Group, parameters: Any) -> None:
    """Restores the whole state of an optimizer if an earlier step has sharded it. All workers must call this function.

    State of parameters that are not in the tree of ``parameters`` is dropped.
    """
    state = any_optimizer.flat_state(optimizer)
    paths = hashlib.sha256(repr(sorted(state)).encode()).hexdigest()
    if len(set(workers.gather(group, paths))) > 1:
        shared = workers.share(group, {"optimizer": state})["optimizer"]
        scalars = {name: value for name, value in optimizer.state.items() if isinstance(value, mx.array)}
        places = tree_map(lambda _: {}, parameters)
        optimizer.state, _ = any_optimizer.arranged({**places, **scalars}, shared)
