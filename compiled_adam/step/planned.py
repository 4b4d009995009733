"""The update of a step as a function of lists of arrays, for `compiled-adam plan`: it is traced and never evaluated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from ..base import Places, trainable_places
from ..update import window
from .bound import trees_of
from .settings import checked
from .update_graph import UpdateGraph


class PlannedUpdate(NamedTuple):
    """``function(*gradients, *arrays)`` returns all new arrays. Nothing is evaluated, so all may be lazy."""

    function: Callable[..., list[mx.array]]
    gradients: list[mx.array]  # of the shapes and dtypes of the gradients
    arrays: list[mx.array]  # window, parameters and state: a step replaces them, and their memory is free once read


def update_of(model: nn.Module, optimizer: optim.Optimizer, accumulate: int) -> PlannedUpdate:
    """What `TrainStep` computes after the last gradient of an update. The ``optimizer`` has its state already."""
    found, template = trainable_places(model)
    parameters = Places(found)
    weights = parameters.read()
    settings = checked(accumulate, True, 1, None, "float32", False)
    trees = trees_of(model, optimizer, parameters, template, settings)
    graph = UpdateGraph(optimizer, trees, [weight.dtype for weight in weights], settings)
    sums = window.empty(weights) if accumulate > 1 else ()
    before = (sums, *trees.read())
    leaves: Any = tree_flatten(before)

    def function(*given: mx.array) -> list[mx.array]:
        rest = iter(given[len(weights) :])
        sums, parameters, state = tree_map(lambda _: next(rest), before)
        updated, new, norm, _ = graph.traced(list(given[: len(weights)]), sums, parameters, state)
        leaves: Any = tree_flatten(new)
        return [norm, *updated, *(array for _, array in leaves)]  # in the order in which a step evaluates them

    return PlannedUpdate(function, weights, [array for _, array in leaves])
