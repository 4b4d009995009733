"""Sharded optimizer state: each worker of a group keeps the state of some parameters, and updates only those.

The shard of a worker is the set of these parameters. Every worker knows the mean gradient of all parameters (see
`reduce`), and so the global norm, and clips and skips like the others. It updates the parameters of the shard. Then the
workers exchange the new weights. No parameter is split. So an update that treats each parameter separately gives the
same bits as without sharding.

Source: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models", SC 2020, stage 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

from ..base import InputError, along, indexed
from ..optimizers import Adam, Compensated, ForSteps, any_optimizer
from ..update import Part, global_norm
from . import workers
from .reduce import AT_ONCE, LIMIT, joined


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
        pieces = [mine[i] for i in call.leaves[group.rank()]]
        if padding := call.length - sum(piece.size for piece in pieces):
            pieces.append(mx.zeros(padding, call.dtype))
        # Each call depends on the one before, as in `reduce`: all workers must make the calls in the same order.
        after = mx.distributed.all_gather(mx.depends(joined(pieces), after), group=group)
        for worker, leaves in enumerate(call.leaves):
            at = worker * call.length
            for i in leaves:
                found[i] = after[at : at + weights[i].size].reshape(weights[i].shape)
                at += weights[i].size
    return found


class _Part(NamedTuple):
    """The parameters of one optimizer, as trees of indices."""

    optimizer: optim.Optimizer
    every: Any
    own: Any  # those that this worker keeps


def _parts(optimizer: optim.Optimizer, parameters: Any, every: dict[str, int], own: dict[str, int]) -> Iterator[_Part]:
    """The parts of the optimizer, from the indices of all parameters, and of those of this worker, by path."""
    if isinstance(optimizer, optim.MultiOptimizer):
        for child, its in any_optimizer.split(optimizer, parameters):
            yield from _parts(child, its, every, own)
    else:
        yield _Part(optimizer, indexed(parameters, every), indexed(parameters, own))


def _values(tree: Any) -> list[Any]:
    return [container[key] for _, container, key in along(tree, tree)]


def _without_arrays(optimizer: optim.Optimizer, parameters: Any) -> Any:
    """The tree of a state in which no parameter has arrays: a template for `any_optimizer.arranged`."""
    if isinstance(optimizer, Compensated):
        return _without_arrays(optimizer.wrapped, parameters)
    if isinstance(optimizer, optim.MultiOptimizer):
        return {"states": [_without_arrays(*each) for each in any_optimizer.split(optimizer, parameters)]}
    scalars = {name: value for name, value in optimizer.state.items() if isinstance(value, mx.array)}
    return {**tree_map(lambda _: {}, parameters), **scalars}


def _prefixes(optimizer: optim.Optimizer) -> list[str]:
    """What the paths in a flat state begin with, for each optimizer that has state."""
    if isinstance(optimizer, Compensated):
        return _prefixes(optimizer.wrapped)
    if not isinstance(optimizer, optim.MultiOptimizer):
        return [""]
    return [f"states.{i}.{rest}" for i, child in enumerate(optimizer.optimizers) for rest in _prefixes(child)]


class Shard:
    """The parameters whose optimizer state this worker keeps.

    Args:
        optimizer: an optimizer that has passed `check`.
        parameters: the tree of parameters.
        paths: the paths of the parameters, in the order of the updates.
        group: the workers. All must make a `Shard` with the same arguments.
    """

    def __init__(
        self, optimizer: optim.Optimizer, parameters: Any, paths: Sequence[str], group: mx.distributed.Group
    ) -> None:
        self._optimizer, self._group = optimizer, group
        leaves = _values(parameters)
        sizes = [leaf.size for leaf in leaves]
        owned = owners(sizes, group.size())
        every = {path: i for i, path in enumerate(paths)}
        own = {path: i for path, i in every.items() if owned[i] == group.rank()}
        self._parts = list(_parts(optimizer, parameters, every, own))
        self._others = {f"{before}{path}" for before in _prefixes(optimizer) for path in every.keys() - own.keys()}
        self._rounds = rounds(sizes, [leaf.dtype for leaf in leaves], group.size())

    def has(self, path: str) -> bool:
        """Whether this worker keeps the array at a path of the state. Arrays that belong to no parameter are on all."""
        return path.rpartition(".")[0] not in self._others

    def own(self, state: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The part of a flat state that this worker keeps."""
        return {path: array for path, array in state.items() if self.has(path)}

    def init(self, parameters: Any) -> None:
        """Creates missing state of the parameters of this shard. Drops the state of all other parameters."""
        state = any_optimizer.flat_state(self._optimizer)
        if len(own := self.own(state)) < len(state):
            self._optimizer.state = any_optimizer.arranged(self._optimizer.state, own)[0]
        for part in self._parts:
            mine = tree_map(lambda _, parameter: parameter, part.own, parameters)
            if isinstance(part.optimizer, Adam):
                every = tree_map(lambda _, parameter: parameter, part.every, parameters)
                ForSteps(part.optimizer).kept.init_part(mine, every)
            else:
                any_optimizer.init(part.optimizer, mine)

    def update(
        self, gradients: Sequence[mx.array], weights: Sequence[mx.array], norm: mx.array, after: mx.array
    ) -> list[mx.array]:
        """All new weights, from all gradients and their global ``norm``. ``after`` is as in `gathered`."""
        new: dict[int, mx.array] = {}
        for part in self._parts:
            new |= _updated(part, gradients, weights, norm)
        return gathered(new, weights, self._rounds, self._group, after)


def _updated(
    part: _Part, gradients: Sequence[mx.array], weights: Sequence[mx.array], norm: mx.array
) -> dict[int, mx.array]:
    """The new weights of this worker by their indices. ``norm`` is that of the gradients of all optimizers."""
    optimizer, every, own = part.optimizer, _values(part.every), _values(part.own)
    mine = tree_map(lambda i: gradients[i], part.own)
    parameters = tree_map(lambda i: weights[i], part.own)
    if len(every) < len(gradients):
        norm = global_norm([gradients[i] for i in every])
    if isinstance(optimizer, Adam):
        its = Part(norm, tuple(every.index(i) for i in own), len(every))
        new = ForSteps(optimizer).apply_part(mine, parameters, its)
    elif isinstance(optimizer, Compensated):
        new = optimizer.apply_part(mine, parameters, norm)
    else:
        new = optimizer.apply_gradients(mine, parameters)
    return {i: container[key] for i, (_, container, key) in zip(own, along(part.own, new), strict=True)}


# The classes whose update of one parameter needs the gradients of others for the norm only.
_BY_PARAMETER = (Adam, Compensated, optim.MultiOptimizer, optim.Optimizer)


def check(optimizer: optim.Optimizer) -> None:
    """Raises ValueError if one parameter's update by the optimizer may need the gradients of others."""
    for each in any_optimizer.every(optimizer):
        for name in ("apply_gradients", "update"):
            known = [getattr(own, name) for own in _BY_PARAMETER]
            if getattr(type(each), name, known[0]) not in known:
                raise InputError(
                    f"shard_state=True needs an optimizer that updates each parameter by itself, but"
                    f" {type(each).__name__} has a method {name} of its own; override apply_single instead, or use"
                    " shard_state=False"
                )


def complete(optimizer: optim.Optimizer, group: mx.distributed.Group, parameters: Any) -> None:
    """Restores the whole state of an optimizer if an earlier step has sharded it. All workers must call this function.

    State of parameters that are not in the tree of ``parameters`` is dropped.
    """
    state = any_optimizer.flat_state(optimizer)
    paths = hashlib.sha256(repr(sorted(state)).encode()).hexdigest()
    if len(set(workers.gather(group, paths))) > 1:
        shared = workers.share(group, {"optimizer": state})["optimizer"]
        optimizer.state, _ = any_optimizer.arranged(_without_arrays(optimizer, parameters), shared)
