"""Layers of experts in a trace of `step_memory`.

mlx-lm sorts tokens by expert. The gradient of the experts' weights is then a ``SegmentedMM``, which MLX cannot export.
Of tokens in any order MLX exports it: a product for each token, and a ``Scatter`` that adds the products. So layers are
traced as if nothing was sorted, and both operations become the one that a run has.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn

from ..base import Graph, Operation
from .recompute import replaced

_SORTED = "sorted_indices"  # an argument of the layers of experts in mlx_lm.models.switch_layers and mlx_lm.tuner


@contextmanager
def traceable(model: nn.Module) -> Iterator[Callable[[Graph], Graph]]:
    """Inside the block layers of experts can be traced. Of such a trace, the function makes the graph of a run."""
    were_sorted = []

    def unsorted(layer: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        were_sorted.append(kwargs.get(_SORTED, False))
        return call(layer, *args, **{**kwargs, _SORTED: False})

    layers = [each for each in model.modules() if _SORTED in inspect.signature(type(each).__call__).parameters]
    with replaced(layers, unsorted):
        yield lambda graph: _in_segments(graph) if any(were_sorted) else graph


def _in_segments(graph: Graph) -> Graph:
    """The graph with one operation in place of a product of each token and the sum of these products."""
    maker = {name: operation for operation in graph.operations for name in operation.outputs}
    users = Counter(name for operation in graph.operations for name in operation.inputs)

    def of_run(operation: Operation) -> Operation:
        view = maker.get(operation.inputs[-1]) if operation.name == "Scatter" else None
        product = maker.get(view.inputs[0]) if view is not None and view.name == "ExpandDims" else None
        if product is None or product.name not in ("GatherMM", "GatherQMM") or users[product.outputs[0]] > 1:
            return operation
        return product._replace(outputs=operation.outputs)

    found, needed = list[Operation](), set(graph.outputs)
    for operation in map(of_run, reversed(graph.operations)):
        if not needed.isdisjoint(operation.outputs):
            found.append(operation)
            needed.update(operation.inputs)
    return graph._replace(operations=found[::-1])
