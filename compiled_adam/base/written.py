"""Whether arrays that were written into a tree are still what stands there."""

from __future__ import annotations

import io
from collections.abc import Sequence

import mlx.core as mx


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
            untouched = _graph(self.own, self._names, self.own)
            if "shape=rectangle" in untouched:  # an operation
                return False
            self._untouched = untouched
        return _graph(self.own, self._names, self.arrays) == self._untouched


def _graph(own: list[mx.array], names: list[str], arrays: list[mx.array]) -> str:
    text = io.StringIO()
    mx.export_to_dot(text, *own, **dict(zip(names, arrays, strict=True)))
    return text.getvalue()
