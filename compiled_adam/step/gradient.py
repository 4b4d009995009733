"""The forward and backward pass: one compiled function for each batch signature, the least recently used goes first."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..base import Compiled, InputError, Places, Structure, is_evaluated, undone_on_error
from . import signature as batches
from .loss import checked


class Gradients(NamedTuple):
    """What the forward and backward pass of a batch give, all lazy."""

    loss: mx.array
    aux: list[Any]
    assigned: dict[int, mx.array]  # what the forward pass has assigned, by the index among the model's arrays
    gradients: list[mx.array]
    weight: mx.array


class GradientGraphs:
    """The gradient of ``loss_fn`` for a model whose arrays stand at ``arrays``, the trainable ones first.

    ``traces`` counts under "grad" and "evicted"; ``assigned`` gets the arrays that are no parameters, but assigned, by
    path, as they were before the first such trace.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        weighted: bool,
        max_traces: int,
        structure: Structure,
        arrays: Places,
        trainable: int,
        traces: dict[str, int],
        assigned: dict[str, mx.array],
    ) -> None:
        self._model, self._loss_fn, self._weighted, self._max_traces = model, loss_fn, weighted, max_traces
        self._structure, self._arrays, self._trainable = structure, arrays, trainable
        self._traces, self._assigned = traces, assigned
        self._compiled: OrderedDict[Hashable, Compiled] = OrderedDict()

    def __call__(self, signature: Hashable, batch: list[mx.array]) -> Gradients:
        # Layers read `training` while they are traced, so a trace holds for one setting of it only.
        key = signature, tuple([module.training for module in self._structure.modules])
        graph = self._compiled.get(key)
        if graph is None:
            while len(self._compiled) >= self._max_traces:
                self._compiled.popitem(last=False)
                self._traces["evicted"] += 1
            graph = self._compile(signature)
        gradients = Gradients(*graph(self._arrays.read(), batch))
        self._compiled[key] = graph
        self._compiled.move_to_end(key)
        return gradients

    def _compile(self, signature: Hashable) -> Compiled:
        def gradient(arrays: list[mx.array], batch: list[mx.array]) -> Any:
            self._traces["grad"] += 1
            args, kwargs = batches.rebuild(signature, iter(batch))
            # Everything but the loss leaves by a list: as a further output of value_and_grad it gets a
            # stop_gradient, over which mx.compile loses outputs (IndexError) if a cast occurs in the loss as well.
            rest: list[Any] = []

            def forward(parameters: list[mx.array]) -> mx.array:
                before = [*parameters, *arrays[self._trainable :]]
                operations = _operations(before)
                self._arrays.write(before)
                loss, aux, weight = checked(self._loss_fn(self._model, *args, **kwargs), self._weighted)
                self._follow_structure()
                after = self._arrays.read()
                changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a is not b]
                if _operations(before) != operations:  # of all at once, for it is rare
                    # value_and_grad differentiates with respect to copies: one operation is none of the forward pass.
                    edited = (i for i, a in enumerate(before) if _operations([a]) > (i < self._trainable))
                    changed = sorted({*changed, *edited})
                # Only these leave the graph; most models have none. MLX keeps the indices with the trace.
                rest.extend((aux, {i: after[i] for i in changed}, weight))
                return loss

            originals, put_back = self._arrays.read(), self._structure.snapshot()

            def traced() -> Any:
                found = mx.value_and_grad(forward)(arrays[: self._trainable])
                # What the forward pass did to other things than arrays stays, as it does without a step.
                self._arrays.write(originals)
                return found

            loss, gradients = undone_on_error(traced, put_back)
            aux, assigned, weight = rest
            for i in assigned:
                if i >= self._trainable:
                    self._assigned.setdefault(self._arrays.paths[i], originals[i])
            return loss, aux, assigned, gradients, weight

        return Compiled(gradient, self._max_traces, draws=True)

    def _follow_structure(self) -> None:
        """Lets the forward pass keep what depends neither on the batch nor on the parameters, such as a mask."""
        if self._structure.intact():
            return
        now = Structure(self._model)
        added = self._structure.added(now)
        trainable = dict(tree_flatten(self._model.trainable_parameters()))
        refused = [path for path, container, key in added if path in trainable or not is_evaluated(container[key])]
        if refused or not self._structure.follow(now, added):
            names = ", ".join(sorted(refused)) or "replaced a container"
            raise InputError(
                f"loss_fn changed the structure of the model ({names});"
                " what the forward pass assigns must exist before make_step, so create it in __init__"
            )


def _operations(arrays: list[mx.array]) -> int:
    """How many operations arrays are the result of; while tracing, none for an input.

    Assigning in place, as ``self.count += 1`` does, changes the array object itself, so that only this tells.
    """
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    return graph.getvalue().count("shape=rectangle")
