"""What MLX's graph of lazy arrays tells: its kernels, its operations, and which objects are the same array.

MLX has no function for that. It writes the graph as text for Graphviz, and this file alone reads that text.
"""

from __future__ import annotations

import collections
import io
import re
from collections.abc import Sequence

import mlx.core as mx

_OPERATION = "shape=rectangle"
# Primitives that only describe an array anew: no kernel runs for them and no byte moves (contiguous arrays assumed).
FREE = {
    *("AsStrided", "Broadcast", "BroadcastAxes", "Contiguous", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice"),
    *("Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View"),
}


def kernels(outputs: list[mx.array]) -> collections.Counter[str]:
    """How often each primitive that runs a kernel occurs in the graph of arrays that are not evaluated yet.

    >>> x = mx.ones((2, 2)) + 1
    >>> sorted(kernels([mx.square(x).reshape(-1)]).items())
    [('Add', 1), ('Full', 1), ('Square', 1)]
    """
    names = re.findall(r'label ?= ?"([^"]+)", shape=rectangle', _text(outputs))
    return collections.Counter(name for name in names if name.split()[0] not in FREE)  # "View uint16"


def operations(arrays: Sequence[mx.array]) -> int:
    """How many operations arrays are the result of; while tracing, none for an input.

    Assigning in place, as ``self.count += 1`` does, changes the array object itself, so that only this tells.
    """
    return _text(arrays).count(_OPERATION)


class Written:
    """Arrays as they were assigned to places of a tree.

    Another object at a place is seen at once. Something like ``weight += 1`` or ``a[:] = b`` makes the same object
    another array, which Python cannot see. But the graph of MLX's arrays shows which are the same: it gives each the
    last of its names, those of the objects in the tree after those of objects that nobody else has.
    """

    def __init__(self, arrays: Sequence[mx.array]) -> None:
        self.arrays = list(arrays)
        self.own = [array[...] for array in arrays]  # the same arrays as other objects, which nobody else can edit
        self._names = [f"array{i}" for i in range(len(arrays))]
        self._untouched: str | None = None

    def are(self, arrays: Sequence[mx.array]) -> bool:
        """Whether ``arrays``, read from the places, are those. What nobody has evaluated yet passes for edited."""
        if not all(a is b for a, b in zip(arrays, self.arrays, strict=True)):
            return False
        if self._untouched is None:
            untouched = _text(self.own, self._names, self.own)
            if _OPERATION in untouched:  # an operation
                return False
            self._untouched = untouched
        return _text(self.own, self._names, self.arrays) == self._untouched


def _text(arrays: Sequence[mx.array], names: Sequence[str] = (), named: Sequence[mx.array] = ()) -> str:
    """The graph of ``arrays``, in which the ``named`` ones have names."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays, **dict(zip(names, named, strict=True)))
    return text.getvalue()
