"""Small leaves in flat arrays: a train step updates a hundred norms, biases or adapters as one leaf.

Model and optimizer state keep their trees. Where a leaf is packed, the array there is a view of the flat array, made
anew with every update. What somebody else assigns is another object than that view: it is noticed so, and the flat
array is put together again from what stands in the tree. Nothing of this is in a checkpoint.

Packed are leaves of up to `SMALL` elements, whose kernels would cost more than their loops, with others of the same
dtype, group and form, in flat arrays of up to `FULL` elements, which fit into a core's cache with their moments, and of
up to `MANY` leaves. Leaves whose moments are rounded stochastically stay alone: their random bits belong to them.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple

import mlx.core as mx

from ..base import Assignments, InputError, Places, Structure, Written, along, call_all
from ..optimizers import Adam, ForSteps
from ..update import Form, Group, Stored, counted, global_norm, residual

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
    """An array in a tree; or several as one flat array, with views of it in the tree, or `hidden` without.

    What is assigned to it is written by others, together with everything else that an update changes. ``watched``: also
    a single array is told from one that somebody has put in its place.
    """

    def __init__(self, places: Sequence[tuple[str, Any, Any]], watched: bool = False) -> None:
        self._paths = [path for path, _, _ in places]
        self._places = [(container, key) for _, container, key in places]
        self._watched = watched
        arrays = [container[key] for container, key in self._places]
        self._kinds = [(array.shape, array.dtype) for array in arrays]
        starts = accumulate((array.size for array in arrays[:-1]), initial=0)
        self._layout = [(a.shape, _strides(a.shape), start) for a, start in zip(arrays, starts, strict=True)]
        self.hidden = False
        self._flat: mx.array | None = None
        self._written: Written | None = None  # what the tree was given; None: nothing, or it is forgotten

    def read(self, assigned: Mapping[int, mx.array] = MappingProxyType({})) -> tuple[mx.array, mx.array | None]:
        """The array, and if somebody has put it in the place of another one, that one.

        ``assigned`` has those that take the place of what the tree has. Raises ValueError for an array that has become
        one of another shape or dtype, TypeError for one that has become something else.
        """
        if self.hidden and self._flat is not None:
            return self._flat, None
        arrays = [container[key] for container, key in self._places]
        arrays = [assigned.get(i, array) for i, array in enumerate(arrays)]
        replaced = self._written is not None and not self._written.are(arrays)
        if len(arrays) > 1 and self._flat is not None and self._written is not None and not replaced:
            return self._flat, None
        self._check(arrays)
        if len(arrays) == 1:
            return arrays[0], self._written.own[0] if self._written is not None and replaced else None
        return _flat(arrays), self._flat if replaced else None

    def _check(self, arrays: Sequence[Any]) -> None:
        for path, array, (shape, dtype) in zip(self._paths, arrays, self._kinds, strict=True):
            if not isinstance(array, mx.array):
                raise TypeError(f"{path!r} has become {type(array).__name__}; assign an mx.array")
            if (array.shape, array.dtype) != (shape, dtype):
                raise InputError(
                    f"{path!r} has become {array.dtype} of shape {array.shape}; it was {dtype} of shape {shape}:"
                    " call make_step again, with the same optimizer to keep the moments of parameters whose shape is"
                    " the same"
                )

    def assign(self, array: mx.array, assignments: Assignments) -> None:
        """Puts a new array here, as a part of ``assignments``; while it is hidden, the tree gets nothing."""
        if len(self._places) == 1:
            container, key = self._places[0]
            assignments.add(container, key, array)
            if self._watched:
                assignments.attribute(self, "_written", Written([array]))
            return
        assignments.attribute(self, "_flat", array)
        if not self.hidden:
            self._assign_views(array, assignments)

    def _assign_views(self, flat: mx.array, assignments: Assignments) -> list[mx.array]:
        views = [mx.as_strided(flat, shape, strides, start) for shape, strides, start in self._layout]
        for (container, key), view in zip(self._places, views, strict=True):
            if not (self.hidden and key in container):
                assignments.add(container, key, view)
        assignments.attribute(self, "_written", Written(views))
        return views

    def show(self, assignments: Assignments) -> list[mx.array]:
        """Puts views of a hidden array into the tree, as a part of ``assignments``; returns them.

        What somebody has put there in the meantime stays.
        """
        if not self.hidden or self._flat is None:
            return []
        views = self._assign_views(self._flat, assignments)
        assignments.attribute(self, "hidden", False)
        return views

    def hideable(self) -> list[tuple[Any, Any]]:
        """Where `hide` takes something out of the tree."""
        return self._places if len(self._places) > 1 else []

    def hide(self) -> None:
        """Takes what is packed out of the tree, where it would be out of date, and keep memory, after an update."""
        if self.hidden or len(self._places) == 1:
            return
        own, flat = vars(self), self.read()[0]
        call_all(
            [
                partial(operator.setitem, own, "_flat", flat),
                partial(operator.setitem, own, "_written", None),
                partial(operator.setitem, own, "hidden", True),
                *(partial(dict.pop, container, key, None) for container, key in self._places),
            ]
        )

    def places(self) -> list[tuple[Any, Any, mx.array]]:
        """Where the arrays are, as (container, key, array); nowhere while they are hidden."""
        return [] if self.hidden else [(container, key, container[key]) for container, key in self._places]

    def forget(self) -> None:
        """Takes what is there now for what was written."""
        if not self.hidden:
            self._written = None


State = tuple[list[Stored], Stored]  # of the leaves, and the scalars


class PackedTrees:
    """What `apply.Trees` does, for an `Adam` and with small leaves packed.

    The moments in ``optimizer.state`` are made when somebody asks for the state, which is less often than once a step.
    """

    def __init__(self, optimizer: Adam, parameters: Places, template: Any, small: int = SMALL) -> None:
        self._optimizer = optimizer
        self._inside = inside = ForSteps(optimizer)
        self._kept = inside.kept
        leaves = [
            Leaf(p.size, p.dtype, *inside.leaves.group_and_form(path, p))
            for path, p in zip(parameters.paths, parameters.read(), strict=True)
        ]
        packed = packs(leaves, small)
        alone = set(range(len(leaves))) - {i for pack in packed for i in pack}
        self._rows = [*packed, *((i,) for i in sorted(alone))]
        self._paths = tuple(parameters.paths[row[0]] for row in self._rows)  # the first stands for all of its pack
        places = [(path, *place) for path, place in zip(parameters.paths, parameters.places, strict=True)]
        self._parameters = [
            Slot([places[i] for i in row], watched=leaves[row[0]].form.compensated) for row in self._rows
        ]
        self._root = optimizer.state
        self._structure = Structure(self._root)
        indices = [container[key] for _, container, key in along(template, template)]
        states = [container[key] for _, container, key in along(template, self._root)]
        containers = dict(zip(indices, states, strict=True))
        self._states: list[dict[str, Slot]] = []
        self._known: list[tuple[Any, Any, mx.array]] = []
        for row in self._rows:
            names = leaves[row[0]].form.names  # nothing else that somebody has put there
            own = [(f"{parameters.paths[i]}.", containers[i]) for i in row]
            self._states.append(
                {name: Slot([(path + name, c, name) for path, c in own], name == "residual") for name in names}
            )

        self._containers = self._structure.children()
        hidden = [place for slots in self._states for slot in slots.values() for place in slot.hideable()]
        self._hidden = [container for container, _ in hidden], [key for _, key in hidden]

    def intact(self) -> bool:
        """Whether the state is still in the containers that it was in."""
        if self._kept.keeper is self and not self._edited():
            return True  # nobody has asked for the state since the last update
        return self._optimizer.state is self._root and self._structure.intact()

    def _edited(self) -> bool:
        """Whether somebody who has kept the state, or a part of it, has put something there while moments are hidden.

        All loops are in C: it is asked at every step.
        """
        parents, keys, children = self._containers
        try:
            same = all(map(operator.is_, map(operator.getitem, parents, keys), children))
        except (KeyError, IndexError):
            return True
        return not same or any(map(operator.contains, *self._hidden))

    def read(self, assigned: Mapping[int, mx.array] = MappingProxyType({})) -> tuple[list[mx.array], State]:
        """The parameters, some of which the forward pass has ``assigned``, and the state; flat arrays as one leaf."""
        parameters, states = [], []
        for row, slot, slots in zip(self._rows, self._parameters, self._states, strict=True):
            own = {n: assigned[i] for n, i in enumerate(row) if i in assigned} if assigned else {}
            weight, before = slot.read(own)
            state = {}
            for name, each in slots.items():
                state[name], replaced = each.read()
                if name == "residual" and before is not None and replaced is None:
                    state[name] = residual.of_replaced(state[name], before, weight)
            parameters.append(weight)
            states.append(state)
        return parameters, (states, self._kept.scalars())

    def settle(self) -> None:
        """Puts the residuals of weights that somebody has replaced into the state: the next update would take them."""
        compensated = [slot for slot, s in zip(self._parameters, self._states, strict=True) if "residual" in s]
        if any(slot.read()[1] is not None for slot in compensated):
            parameters, state = self.read()
            self.write(parameters, state)
            mx.async_eval(parameters, self.state())

    def state(self) -> State:
        """The state as `read` returns it."""
        states = [{name: slot.read()[0] for name, slot in slots.items()} for slots in self._states]
        return states, self._kept.scalars()

    def places(self) -> list[tuple[Any, Any, mx.array]]:
        """Where arrays of the state are in trees that others see, as (container, key, array); `show` adds to it."""
        self._known = [place for slots in self._states for slot in slots.values() for place in slot.places()]
        self._known += [(self._root, key, value) for key, value in self._root.items() if isinstance(value, mx.array)]
        return self._known

    def forget(self) -> None:
        """Weights that are there now belong to the residuals that are there now."""
        for slot, slots in zip(self._parameters, self._states, strict=True):
            for each in (slot, *slots.values()):
                each.forget()

    def _hide(self) -> None:
        """Takes the moments out of the tree. Whoever asks for the state gets them back."""
        self._kept.keeper = self  # first, so that they can be asked for whenever this is interrupted
        for slots in self._states:
            for slot in slots.values():
                slot.hide()

    def write(self, parameters: list[mx.array], state: State) -> None:
        """Assigns what `update` has returned."""
        assignments = Assignments()
        self.assign(parameters, state, assignments)
        assignments.make()

    def assign(self, parameters: list[mx.array], state: State, assignments: Assignments) -> None:
        """What `update` has returned, as a part of ``assignments``."""
        self._hide()
        states, scalars = state
        for slot, array in zip(self._parameters, parameters, strict=True):
            slot.assign(array, assignments)
        for slots, arrays in zip(self._states, states, strict=True):
            for name, slot in slots.items():
                slot.assign(arrays[name], assignments)
        self._kept.assign_scalars(scalars, assignments)

    def show(self) -> None:
        """Puts views of the state into the optimizer's tree."""
        assignments = Assignments()
        views = [slot.show(assignments) for slots in self._states for slot in slots.values()]
        # Evaluated, for another thread may be asking, and what it left unevaluated no other could evaluate.
        mx.async_eval(views)
        assignments.make()
        self._known += [place for slots in self._states for slot in slots.values() for place in slot.places()]

    def named(self, parameters: list[mx.array], state: State) -> list[tuple[str, mx.array]]:
        """The arrays of an update; what has the same last name is the same kind of thing."""
        states, scalars = state
        leaves = [("parameter", p) for p in parameters]
        return leaves + [each for arrays in (*states, scalars) for each in arrays.items()]

    def update(
        self,
        gradients: list[mx.array],
        parameters: list[mx.array],
        state: State,
        after: mx.array | None = None,
        weight: mx.array | None = None,
    ) -> tuple[list[mx.array], State, mx.array]:
        """What `read` returned after one update, and the gradients' norm; for a trace.

        ``gradients`` has one for each parameter. There are no other workers, and nothing to be ``after``. With a
        ``weight`` of 0 the gradients count as 0.
        """
        packed, streams = [], self._inside.leaves.streams(parameters)
        for row, stream in zip(self._rows, streams, strict=True):
            with mx.stream(stream):  # that of its update, so that neither waits for the other stream
                packed.append(_flat([gradients[i] for i in row]))
        states, scalars = state
        new = self._inside.update_leaves(self._paths, packed, parameters, states, scalars, weight)
        norm = new[2].get("grad_norm")  # it knows it if it clips or skips
        if norm is None:
            norm = global_norm(packed, streams)
            norm = norm if weight is None else counted(norm, weight)
        return new[0], new[1:], norm


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
