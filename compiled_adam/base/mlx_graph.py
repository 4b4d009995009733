"""Questions about MLX's graph of lazy arrays: its kernels, its operations, and which objects are the same array.

MLX has no function for these. It can write the graph as text for Graphviz, and only this file reads that text.
"""

from __future__ import annotations

import collections
import io
import operator
import re
from collections.abc import Sequence
from functools import cache

import mlx.core as mx

_OPERATION = "shape=rectangle"
# Primitives that change the description of an array only: no kernel runs, no byte moves (if arrays are contiguous).
FREE = {
    *("AsStrided", "Broadcast", "BroadcastAxes", "Contiguous", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice"),
    *("Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View"),
}
_MOST = 1000  # names in a text; MLX's functions take at most 1024 keyword arguments


def kernels(outputs: list[mx.array]) -> collections.Counter[str]:
    """How often each primitive that runs a kernel occurs in the graph of unevaluated arrays.

    >>> x = mx.ones((2, 2)) + 1
    >>> sorted(kernels([mx.square(x).reshape(-1)]).items())
    [('Add', 1), ('Full', 1), ('Square', 1)]
    """
    names = re.findall(r'label ?= ?"([^"]+)", shape=rectangle', _text(outputs))
    return collections.Counter(name for name in names if name.split()[0] not in FREE)  # "View uint16"


def operations(arrays: Sequence[mx.array]) -> int:
    """How many operations the graph of the arrays has. While tracing, an input of the trace has none.

    An in-place edit such as ``self.count += 1`` keeps the array object, so only this count reveals the edit.
    """
    return _text(arrays).count(_OPERATION)


def reached(outputs: Sequence[mx.array], arrays: Sequence[mx.array]) -> list[bool]:
    """Whether each of the ``arrays`` is an input of an operation in the graph of the ``outputs``.

    >>> a, b = mx.ones(2), mx.ones(2)
    >>> reached([a + 1], [a, b])
    [True, False]
    """
    found = []
    for start in range(0, len(arrays), _MOST):
        part = arrays[start : start + _MOST]
        names = [f"array{i}" for i in range(len(part))]
        text = _text(outputs, names, part)
        found += [f'"{name}" -> ' in text for name in names]
    return found


class Written:
    """Remembers arrays that were assigned to places of a tree, to detect whether a caller has edited them.

    A new object at a place is easy to see. After ``weight += 1`` or ``a[:] = b`` the same object is another array,
    which Python cannot see. The text of MLX's graph shows it: if two objects are the same array, the array gets the
    last name only. So private copies of the objects get their names first, and the objects in the tree afterwards.
    """

    def __init__(self, arrays: Sequence[mx.array]) -> None:
        self.arrays = list(arrays)
        self.own = [array[...] for array in arrays]  # the same arrays in private objects, which no caller can edit

    def are(self, arrays: Sequence[mx.array]) -> bool:
        """Whether ``arrays``, read from the places, are unedited. An array that is not evaluated counts as edited."""
        if len(arrays) != len(self.arrays) or not all(map(operator.is_, arrays, self.arrays)):
            return False
        names, untouched = _untouched(len(self.own))
        return _text(self.own, names, self.arrays) == untouched


@cache
def _untouched(count: int) -> tuple[list[str], str]:
    """Names for ``count`` arrays, and the text of any evaluated arrays with these names: MLX writes the names only."""
    arrays, names = [mx.array(0.0) for _ in range(count)], [f"{i}" for i in range(count)]
    return names, _text(arrays, names, arrays)


def _text(arrays: Sequence[mx.array], names: Sequence[str] = (), named: Sequence[mx.array] = ()) -> str:
    """The graph of ``arrays`` as text, in which the arrays ``named`` have the ``names``."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays, **dict(zip(names, named, strict=True)))
    return text.getvalue()
