"""Small leaves packed into flat arrays: a train step updates a hundred norms, biases or adapters as one leaf.

A leaf is one parameter array. Model and optimizer state keep their trees. A packed leaf in a tree is a view of the flat
array, made anew with every update. If a caller assigns another array, it is not that view object: the step sees this
and builds the flat array again from the arrays in the tree. A checkpoint does not show the packing.

`update/packing.py` decides which leaves are packed.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import mlx.core as mx

from ..base import Assignments, InputError, Places, Structure, Written, along, call_all
from ..optimizers import Adam, ForSteps
from ..update import SMALL, Leaf, Stored, apart, flat, packs, residual, row_major


class Slot:
    """One array in a tree, or one flat array for several. The tree then has views of the flat array, unless `hidden`.

    A slot never assigns by itself: `assign` adds to the assignments of the whole update. ``watched``: a slot of one
    array also detects that a caller has replaced the array.
    """

    def __init__(self, places: Sequence[tuple[str, Any, Any]], watched: bool = False) -> None:
        self._paths = [path for path, _, _ in places]
        self._containers = [container for _, container, _ in places]
        self._keys = [key for _, _, key in places]
        self._watched = watched
        arrays = self._present()
        self._kinds = [(array.shape, array.dtype) for array in arrays]
        self._shapes = [array.shape for array in arrays]
        self.hidden = False
        self._flat: mx.array | None = None
        self._written: Written | None = None  # the arrays that were put into the tree; None: none

    def _present(self) -> list[Any]:
        return list(map(operator.getitem, self._containers, self._keys))  # in C, because a step reads thousands

    def read(self, assigned: Mapping[int, mx.array] = MappingProxyType({})) -> tuple[mx.array, mx.array | None]:
        """The present array, and the array that a caller has replaced by it (None if the array was not replaced).

        ``assigned`` has arrays that replace those in the tree. Raises ValueError if an array has changed in shape or
        dtype, TypeError if it was replaced by something that is no array.
        """
        if self.hidden and self._flat is not None:
            return self._flat, None
        arrays = self._present()
        for i, array in assigned.items():
            arrays[i] = array
        replaced = self._written is not None and not self._written.are(arrays)
        if len(arrays) > 1 and self._flat is not None and self._written is not None and not replaced:
            return self._flat, None
        self._check(arrays)
        if len(arrays) == 1:
            return arrays[0], self._written.own[0] if self._written is not None and replaced else None
        return flat(arrays), self._flat if replaced else None

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
        """Adds the assignment of a new array to ``assignments``. While it is hidden, the tree gets nothing."""
        if len(self._keys) == 1:
            assignments.add(self._containers[0], self._keys[0], array)
            if self._watched:
                assignments.attribute(self, "_written", Written([array]))
            return
        assignments.attribute(self, "_flat", array)
        if not self.hidden:
            self._assign_views(array, assignments)

    def _assign_views(self, flat: mx.array, assignments: Assignments) -> list[mx.array]:
        views = apart(flat, self._shapes)
        if self.hidden:
            for container, key, view in zip(self._containers, self._keys, views, strict=True):
                if key not in container:
                    assignments.add(container, key, view)
        else:
            assignments.add_all(self._containers, self._keys, views)
        assignments.attribute(self, "_written", Written(views))
        return views

    def show(self, assignments: Assignments) -> list[mx.array]:
        """Adds to ``assignments`` that the tree gets views of a hidden array; returns the views.

        An array that a caller has put there in the meantime stays.
        """
        if not self.hidden or self._flat is None:
            return []
        views = self._assign_views(self._flat, assignments)
        assignments.attribute(self, "hidden", False)
        return views

    def hideable(self) -> list[tuple[Any, Any]]:
        """The places (container, key) that `hide` empties."""
        return list(zip(self._containers, self._keys, strict=True)) if len(self._keys) > 1 else []

    def hide(self) -> None:
        """Takes packed arrays out of the tree: after an update they would be out of date and take memory."""
        if self.hidden or len(self._keys) == 1:
            return
        own, flat = vars(self), self.read()[0]
        call_all(
            [
                partial(operator.setitem, own, "_flat", flat),
                partial(operator.setitem, own, "_written", None),
                partial(operator.setitem, own, "hidden", True),
                *(partial(dict.pop, container, key, None) for container, key in self.hideable()),
            ]
        )

    def places(self) -> list[tuple[Any, Any, mx.array]]:
        """The places of the arrays, as (container, key, array). Empty while they are hidden."""
        return [] if self.hidden else list(zip(self._containers, self._keys, self._present(), strict=True))


State = tuple[list[Stored], Stored]  # the states of the leaves, and the scalars


class PackedTrees:
    """Like `apply.Trees`, but for an `Adam`, and with small leaves packed.

    The packed moments are put into ``optimizer.state`` only when a caller reads it, which is rarer than once a step.
    """

    def __init__(self, optimizer: Adam, parameters: Places, template: Any, small: int = SMALL) -> None:
        self._optimizer = optimizer
        self._inside = inside = ForSteps(optimizer)
        self._kept = inside.kept
        leaves = [
            Leaf.of(p, *inside.leaves.group_and_form(path, p))
            for path, p in zip(parameters.paths, parameters.read(), strict=True)
        ]
        packed = packs(leaves, small)
        alone = set(range(len(leaves))) - {i for pack in packed for i in pack}
        self._rows = [*packed, *((i,) for i in sorted(alone))]
        self._paths = tuple(parameters.paths[row[0]] for row in self._rows)  # the first path stands for the pack
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
            names = leaves[row[0]].form.names  # no other arrays that a caller may have put there
            own = [(f"{parameters.paths[i]}.", containers[i]) for i in row]
            self._states.append(
                {name: Slot([(path + name, c, name) for path, c in own], name == "residual") for name in names}
            )

        self._containers = self._structure.children()
        hidden = [place for slots in self._states for slot in slots.values() for place in slot.hideable()]
        self._hidden = [container for container, _ in hidden], [key for _, key in hidden]

    def intact(self) -> bool:
        """Whether the state is still in the same containers."""
        if self._kept.keeper is self and not self._edited():
            return True  # no caller has read the state since the last update
        return self._optimizer.state is self._root and self._structure.intact()

    def _edited(self) -> bool:
        """Whether a caller who kept a reference to the state (or a part) has edited it while moments are hidden.

        All loops run in C, because this runs at every step.
        """
        parents, keys, children = self._containers
        try:
            same = all(map(operator.is_, map(operator.getitem, parents, keys), children))
        except (KeyError, IndexError):
            return True
        return not same or any(map(operator.contains, *self._hidden))

    def read(self, assigned: Mapping[int, mx.array] = MappingProxyType({})) -> tuple[list[mx.array], State]:
        """All parameters and the state, with flat arrays as one leaf. The forward pass has replaced ``assigned``."""
        parameters, states = [], []
        for row, slot, slots in zip(self._rows, self._parameters, self._states, strict=True):
            own = {n: assigned[i] for n, i in enumerate(row) if i in assigned} if assigned else assigned
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
        """Resets in the state the residuals of weights that a caller has replaced, as the next update would do."""
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
        """The places of the state's arrays in trees that users see, as (container, key, array). `show` adds more."""
        self._known = [place for slots in self._states for slot in slots.values() for place in slot.places()]
        self._known += self._kept.places()
        return self._known

    def _hide(self) -> None:
        """Takes the moments out of the tree. `Adam.state` puts them back when a caller reads it."""
        self._kept.keeper = self  # first, so that `Adam.state` works after an interrupt at any line
        for slots in self._states:
            for slot in slots.values():
                slot.hide()

    def write(self, parameters: list[mx.array], state: State) -> None:
        """Assigns the arrays that `update` has returned."""
        assignments = Assignments()
        self.assign(parameters, state, assignments)
        assignments.make()

    def assign(self, parameters: list[mx.array], state: State, assignments: Assignments) -> None:
        """Adds the arrays that `update` has returned to ``assignments``."""
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
        # Evaluated, because this may be another thread, and only that thread could evaluate its lazy arrays later.
        mx.async_eval(views)
        assignments.make()
        self._known += [place for slots in self._states for slot in slots.values() for place in slot.places()]

    def named(self, parameters: list[mx.array], state: State) -> list[tuple[str, mx.array]]:
        """The arrays of an update with names. Arrays of the same kind have the same last part of the name."""
        states, scalars = state
        leaves = [("parameter", p) for p in parameters]
        return leaves + [each for arrays in (*states, scalars) for each in arrays.items()]

    def pack(self, gradients: list[mx.array]) -> list[mx.array]:
        """One array per parameter or gradient, packed. Call it while tracing, also in the graph of the gradients.

        There a pack is one result of the graph, and not hundreds. Each copy is on the stream of the pack's update, so
        that no stream waits for another.
        """
        sizes = [sum(gradients[i].size for i in row) for row in self._rows]
        packed = []
        for row, stream in zip(self._rows, self._inside.leaves.streams(sizes), strict=True):
            with mx.stream(stream):
                packed.append(flat([gradients[i] for i in row]))
        return packed

    def update(
        self,
        gradients: list[mx.array],
        parameters: list[mx.array],
        state: State,
        after: mx.array | None = None,
        weight: mx.array | None = None,
    ) -> tuple[list[mx.array], State, mx.array]:
        """Returns updated parameters and state, as from `read`, and the norm of the gradients. Call it while tracing.

        ``gradients`` are those that `pack` returns. There are no other workers, so ``after`` is not used. With a
        ``weight`` of 0 the gradients count as 0.
        """
        states, scalars = state
        streams = self._inside.leaves.streams([p.size for p in parameters])
        gradients = [row_major(g, stream) for g, stream in zip(gradients, streams, strict=True)]
        new, states, found = self._inside.update_leaves(self._paths, gradients, parameters, states, scalars, weight)
        return new, (states, {name: found[name] for name in scalars}), found["grad_norm"]
