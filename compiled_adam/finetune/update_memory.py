"""The memory that the update of a step needs for a moment, computed from shapes alone.

The gradients are there at once. Each is freed when its parameter has been updated. Until then there are copies of
gradients in the order of the memory, packs, sums of squares, joined weights and guesses of square roots, of as many
parameters as are being updated at a time.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from ..base import InputError, peak, traced
from ..optimizers import Adam
from ..step import update_of
from .activations import OF_MODELS


def of_update(model: nn.Module, optimizer: optim.Optimizer, accumulate: int, layout: list[bool]) -> int:
    """The most bytes beside weights, state and window, gradients included. All arrays may be lazy, none is evaluated.

    ``layout`` is that of the gradients, from `activations.layout`.

    Raises:
        ValueError: the update cannot be traced. The message says why.
    """
    try:
        update = update_of(model, optimizer, accumulate)
        gradients = [mx.zeros(each.shape, each.dtype) for each in update.gradients]
        graph = traced(update.function, *gradients, *update.arrays)
        strided = [*layout, *(False for _ in update.arrays)]
        owned = dict(zip(graph.inputs, strided, strict=True))
        streams = 2 if isinstance(optimizer, Adam) else 1
        return peak(graph, owned, streams) - sum(array.nbytes for array in update.arrays)
    except OF_MODELS as error:
        raise InputError(f"the update's memory cannot be computed: {str(error).partition(chr(10))[0]}") from error
