"""Small leaves in flat arrays: a train step updates a hundred norms, biases or adapters as one leaf.

Model and optimizer state keep their trees. Where a leaf is packed, the array there is a view of the flat array, made
anew with every update. What somebody else assigns is another object than that view: it is noticed so, and the flat
array is put together again from what stands in the tree. Nothing of this is in a checkpoint.

Packed are leaves of up to `SMALL` elements, whose kernels would cost more than their loops, with others of the same
dtype, group and form, in flat arrays of up to `FULL` elements: what fits into a core's cache with its moments. Moments
that are rounded stochastically stay where they are, since their random bits belong to leaves.
"""

from __future__ import annotations

import io
import operator
from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import mlx.core as mx

from .groups import Group
from .layout import Places, Structure
from .moments import Stored
from .optimizers import Adam
from .update import Form

SMALL = 1 << 16
FULL = 1 << 18


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
        if filled + leaf.size > full:
            pack, filled = [], 0
            found.append(pack)
        pack.append(i)
        last[kind] = pack, filled + leaf.size
    return [tuple(pack) for pack in found if len(pack) > 1]


class Slot:
    """An array in a tree; or several, as views of one flat array."""

    def __init__(self, places: Sequence[tuple[Any, Any]]) -> None:
        self._places = places
        arrays = [container[key] for container, key in places]
        starts = accumulate((array.size for array in arrays[:-1]), initial=0)
        self._layout = [(a.shape, _strides(a.shape), start) for a, start in zip(arrays, starts, strict=True)]
        self._flat: mx.array | None = None
        self._views: list[mx.array] = []  # those in the tree, and what they were then
        self._handed_out: list[mx.array] = []

    def read(self) -> mx.array:
        arrays = [container[key] for container, key in self._places]
        if len(arrays) == 1:
            return arrays[0]
        if self._flat is None or not all(a is b for a, b in zip(arrays, self._views, strict=True)) or self._edited():
            return mx.concatenate([array.reshape(-1) for array in arrays])
        return self._flat

    def write(self, array: mx.array) -> None:
        if len(self._places) == 1:
            container, key = self._places[0]
            container[key] = array
            return
        self._flat = array
        self._views = [mx.as_strided(array, shape, strides, start) for shape, strides, start in self._layout]
        self._handed_out = [view[...] for view in self._views]
        for (container, key), view in zip(self._places, self._views, strict=True):
            container[key] = view

    def _edited(self) -> bool:
        """Whether something like ``weight += 1`` or ``weight[0] = 1`` has made an array object another array.

        Python cannot see that, but MLX gives an array one name in a graph: computed ones that are the same count once.
        """
        graph = io.StringIO()
        mx.export_to_dot(graph, *self._handed_out, *self._views)
        text = graph.getvalue()
        return text.count("rank=source") != len(self._views) or "shape=rectangle" in text


State = tuple[list[Stored], Stored]  # of the leaves, and the scalars


class PackedTrees:
    """What `trees.Trees` does, for an `Adam` and with small leaves packed."""

    def __init__(self, optimizer: Adam, parameters: Places, small: int = SMALL) -> None:
        self._optimizer, self._scalars = optimizer, optimizer.scalar_names
        leaves = [
            Leaf(p.size, p.dtype, *optimizer.group_and_form(path, p))
            for path, p in zip(parameters.paths, parameters.read(), strict=True)
        ]
        packed = packs(leaves, small)
        alone = set(range(len(leaves))) - {i for pack in packed for i in pack}
        self._rows = [*packed, *((i,) for i in sorted(alone))]
        self._groups = [leaves[row[0]].group for row in self._rows]
        self._forms = [leaves[row[0]].form for row in self._rows]
        self._parameters = [Slot([parameters.places[i] for i in row]) for row in self._rows]
        states = {path: container for path, container, _ in Structure(optimizer.state).leaves}
        self._states = []
        for row in self._rows:
            containers = [states[f"{parameters.paths[i]}.m"] for i in row]
            self._states.append({name: Slot([(c, name) for c in containers]) for name in containers[0]})

    def read(self) -> tuple[list[mx.array], State]:
        """The parameters and the state, each flat array as one leaf."""
        states = [{name: slot.read() for name, slot in slots.items()} for slots in self._states]
        scalars = {name: self._optimizer.state[name] for name in self._scalars}
        return [slot.read() for slot in self._parameters], (states, scalars)

    def write(self, parameters: list[mx.array], state: State) -> None:
        """Assigns what `update` has returned."""
        states, scalars = state
        for slot, array in zip(self._parameters, parameters, strict=True):
            slot.write(array)
        for slots, arrays in zip(self._states, states, strict=True):
            for name, slot in slots.items():
                slot.write(arrays[name])
        self._optimizer.state.update(scalars)

    def update(
        self, gradients: list[mx.array], parameters: list[mx.array], state: State
    ) -> tuple[list[mx.array], State, mx.array | None]:
        """What `read` returned after one update, and the gradients' norm if the optimizer knows it; for a trace.

        ``gradients`` has one for each parameter.
        """
        packed = [
            gradients[row[0]] if len(row) == 1 else mx.concatenate([gradients[i].reshape(-1) for i in row])
            for row in self._rows
        ]
        states, scalars = state
        new = self._optimizer.update_packed(packed, parameters, states, scalars, self._groups, self._forms)
        return new[0], new[1:], new[2].get("grad_norm")


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous array, in elements."""
    return tuple(accumulate(reversed(shape[1:]), operator.mul, initial=1))[::-1] if shape else ()
