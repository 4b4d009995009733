"""What a lazy graph consists of: how many kernels it will run."""

from __future__ import annotations

import collections
import re
import tempfile

import mlx.core as mx

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
    with tempfile.NamedTemporaryFile("r", suffix=".dot") as file:
        mx.export_to_dot(file.name, *outputs)
        names = re.findall(r'label ?= ?"([^"]+)", shape=rectangle', file.read())
    return collections.Counter(name for name in names if name.split()[0] not in FREE)  # "View uint16"
