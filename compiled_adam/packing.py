"""Small leaves in flat arrays: a train step updates a hundred norms, biases or adapters as one leaf.

Model and optimizer state keep their trees. Where a leaf is packed, the array there is a view of the flat array, made
anew with every update. What somebody else assigns is another object than that view: it is noticed so, and the flat
array is put together again from what stands in the tree. Nothing of this is in a checkpoint.

Packed are leaves of up to `SMALL` elements, whose kernels would cost more than their loops, with others of the same
dtype, group and form, in flat arrays of up to `FULL` elements, which fit into a core's cache with their moments, and of
up to `MANY` leaves. Leaves whose moments are rounded stochastically stay alone: their random bits belong to them.
"""

from __future__ import annotations

import io
import operator
from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import mlx.core as mx

from . import rule
from .errors import InputError
from .groups import Group
from .layout import Places, Structure
from .moments import Stored
from .optimizers import Adam
from .update import Form

SMALL = 1 << 16
FULL = 1 << 18
MANY = 256


class Leaf(NamedTuple):
    """What decides with which others a parameter can be packed."""

    size: int
    dtype: mx.Dtype
    group: Group
    form: Form


def packs(leaves: Sequence[Leaf], small: int = SMALL, full: int = FULL) -> list[tuple[int, ...]]:
    """The indices of the leaves of each flat array, two or more, in the leaves' order.

    >>> leaf = Leaf(3, mx.float32, Group(1.0, True), Form("float32", False, False))
    >>> packs([leaf, leaf._replace(dtype=mx.bfloat16), leaf, leaf, leaf._replace(size=9), leaf], small=8, full=7)
    [(0, 2), (3, 5)]
    """
    found: list[list[int]] = []
    last: dict[Hashable, tuple[list[int], int]] = {}  # the pack that is being filled, and its elements
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


class Slot:
    """An array in a tree; or several, as views of one flat array, which are in the tree while they are `show`n."""

    def __init__(self, places: Sequence[tuple[str, Any, Any]]) -> None:
        self._paths = [path for path, _, _ in places]
        self._places = [(container, key) for _, container, key in places]
        arrays = [container[key] for container, key in self._places]
        self._kinds = [(array.shape, array.dtype) for array in arrays]
        starts = accumulate((array.size for array in arrays[:-1]), initial=0)
        self._layout = [(a.shape, _strides(a.shape), start) for a, start in zip(arrays, starts, strict=True)]
        self._flat: mx.array | None = None
        self._shown = True
        self._views: list[mx.array] = []  # those in the tree, and the same again
        self._same: list[mx.array] = []
        self._names = [f"view{i}" for i in range(len(self._places))]
        self._untouched: str | None = None

    def read(self) -> mx.array:
        """Raises ValueError if a packed array was replaced by one of another shape or dtype."""
        if not self._shown and self._flat is not None:
            return self._flat
        arrays = [container[key] for container, key in self._places]
        if len(arrays) == 1:
            return arrays[0]
        if self._flat is None or not all(a is b for a, b in zip(arrays, self._views, strict=True)) or self._edited():
            self._check(arrays)
            return _flat(arrays)
        return self._flat

    def _check(self, arrays: Sequence[mx.array]) -> None:
        for path, array, (shape, dtype) in zip(self._paths, arrays, self._kinds, strict=True):
            if (array.shape, array.dtype) != (shape, dtype):
                raise InputError(
                    f"{path!r} has become {array.dtype} of shape {array.shape}; it was {dtype} of shape {shape}:"
                    " call make_step again, with the same optimizer to keep its moments"
                )

    def write(self, array: mx.array, show: bool) -> None:
        """Without ``show`` the tree has no arrays at these places until `show` is called."""
        if len(self._places) == 1:
            container, key = self._places[0]
            container[key] = array
            return
        self._flat = array
        if self._shown and not show:
            self._hide()
        self._shown = False
        if show:
            self.show()

    def show(self) -> list[mx.array]:
        """What is in the tree of a flat array, then."""
        if self._shown or self._flat is None:
            return self._views
        self._views = [mx.as_strided(self._flat, shape, strides, start) for shape, strides, start in self._layout]
        self._same = [view[...] for view in self._views]
        for (container, key), view in zip(self._places, self._views, strict=True):
            container[key] = view
        self._shown = True
        return self._views

    def _hide(self) -> None:
        """Takes the views out of the tree, where they would be out of date and keep memory."""
        for container, key in self._places:
            container.pop(key, None)  # one that was interrupted has taken some already
        self._views, self._same, self._shown = [], [], False

    def _edited(self) -> bool:
        """Whether something like ``weight += 1`` or ``a[:] = b`` has made an array object another array.

        Python cannot see that, but the graph of MLX's arrays shows which are the same: it gives each the last of its
        names, those of the views after those of the same again. Views that nobody has evaluated pass for edited.
        """
        if self._untouched is None:
            untouched = _graph(self._same, self._names, self._same)
            if "shape=rectangle" in untouched:  # an operation
                return True
            self._untouched = untouched
        return _graph(self._same, self._names, self._views) != self._untouched


def _graph(same: list[mx.array], names: list[str], views: list[mx.array]) -> str:
    text = io.StringIO()
    mx.export_to_dot(text, *same, **dict(zip(names, views, strict=True)))
    return text.getvalue()


State = tuple[list[Stored], Stored]  # of the leaves, and the scalars


class PackedTrees:
    """What `trees.Trees` does, for an `Adam` and with small leaves packed.

    The moments in ``optimizer.state`` are made when somebody asks for the state, which is less often than once a step.
    """

    def __init__(self, optimizer: Adam, parameters: Places, small: int = SMALL) -> None:
        self._optimizer = optimizer
        leaves = [
            Leaf(p.size, p.dtype, *optimizer.group_and_form(path, p))
            for path, p in zip(parameters.paths, parameters.read(), strict=True)
        ]
        packed = packs(leaves, small)
        alone = set(range(len(leaves))) - {i for pack in packed for i in pack}
        self._rows = [*packed, *((i,) for i in sorted(alone))]
        self._paths = tuple(parameters.paths[row[0]] for row in self._rows)  # the first stands for all of its pack
        places = [(path, *place) for path, place in zip(parameters.paths, parameters.places, strict=True)]
        self._parameters = [Slot([places[i] for i in row]) for row in self._rows]
        self._root = optimizer.state
        self._structure = Structure(self._root)
        self._scalars = [name for name, value in self._root.items() if isinstance(value, mx.array)]
        containers = {path: container for path, container, _ in self._structure.leaves}
        self._states = []
        for row in self._rows:
            own = [(f"{path}.", containers[f"{path}.m"]) for path in (parameters.paths[i] for i in row)]
            names = leaves[row[0]].form.names  # nothing else that somebody has put there
            self._states.append({name: Slot([(path + name, c, name) for path, c in own]) for name in names})

    def intact(self) -> bool:
        """Whether the state is still in the containers that it was in."""
        if self._optimizer.keeper is self:
            return True  # nobody has asked for the state since the last update
        return self._optimizer.state is self._root and self._structure.intact()

    def read(self) -> tuple[list[mx.array], State]:
        """The parameters and the state, each flat array as one leaf."""
        return [slot.read() for slot in self._parameters], self.state()

    def state(self) -> State:
        """The state as `read` returns it."""
        states = [{name: slot.read() for name, slot in slots.items()} for slots in self._states]
        return states, {name: self._root[name] for name in self._scalars}

    def write(self, parameters: list[mx.array], state: State) -> None:
        """Assigns what `update` has returned."""
        states, scalars = state
        for slot, array in zip(self._parameters, parameters, strict=True):
            slot.write(array, show=True)
        for slots, arrays in zip(self._states, states, strict=True):
            for name, slot in slots.items():
                slot.write(arrays[name], show=False)
        self._root.update(scalars)
        self._optimizer.keeper = self

    def show(self) -> None:
        """Puts views of the state into the optimizer's tree."""
        # Evaluated, for another thread may be asking, and what it left unevaluated no other could evaluate.
        mx.async_eval([slot.show() for slots in self._states for slot in slots.values()])

    def update(
        self, gradients: list[mx.array], parameters: list[mx.array], state: State, after: mx.array | None = None
    ) -> tuple[list[mx.array], State, mx.array]:
        """What `read` returned after one update, and the gradients' norm; for a trace.

        ``gradients`` has one for each parameter. There are no other workers, and nothing to be ``after``.
        """
        packed, streams = [], self._optimizer.streams(parameters)
        for row, stream in zip(self._rows, streams, strict=True):
            with mx.stream(stream):  # that of its update, so that neither waits for the other stream
                packed.append(_flat([gradients[i] for i in row]))
        states, scalars = state
        new = self._optimizer.update_leaves(self._paths, packed, parameters, states, scalars)
        norm = new[2].get("grad_norm")  # it knows it if it clips or skips
        return new[0], new[1:], rule.global_norm(packed, streams) if norm is None else norm


def _flat(arrays: Sequence[mx.array]) -> mx.array:
    """All elements in memory order, as one row after the other where all have rows of the same shape."""
    if len(arrays) == 1:
        return arrays[0]
    rows = arrays[0].shape[1:]
    if all(array.ndim and array.shape[1:] == rows for array in arrays):
        return mx.concatenate(list(arrays))  # without a task for each that makes it flat
    return mx.concatenate([array.flatten() for array in arrays])


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous array, in elements."""
    return tuple(accumulate(reversed(shape[1:]), operator.mul, initial=1))[::-1] if shape else ()
