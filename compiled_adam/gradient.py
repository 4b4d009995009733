"""The forward and backward pass: one compiled function for each batch signature, the least recently used goes first."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import batch as batches
from . import random_state
from .errors import InputError
from .layout import Places, Structure
from .loss import checked


class GradientGraphs:
    """The gradient of ``loss_fn`` for a model whose arrays stand at ``arrays``, the trainable ones first.

    A call returns loss, aux, the arrays that the forward pass has assigned (by their index among ``arrays``), the
    gradients, and the weight. ``traces`` counts under "grad" and "evicted"; ``assigned`` gets the arrays that are no
    parameters, but assigned, by path, as they were before the first such trace.
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
        self._compiled: OrderedDict[Hashable, tuple[Callable[..., Any], list[int]]] = OrderedDict()

    def __call__(self, signature: Hashable, batch: list[mx.array]) -> Any:
        # Layers read `training` while they are traced, so a trace holds for one setting of it only.
        key = signature, tuple([module.training for module in self._structure.modules])
        gradient = self._compiled.pop(key, None)
        if gradient is None:
            while len(self._compiled) >= self._max_traces:
                self._compiled.popitem(last=False)
                self._traces["evicted"] += 1
            gradient = self._compile(signature)
        function, changed = gradient
        loss, aux, arrays, gradients, weight = function(self._arrays.read(), batch)
        self._compiled[key] = gradient  # the most recently used comes last
        return loss, aux, dict(zip(changed, arrays, strict=True)), gradients, weight

    def _compile(self, signature: Hashable) -> tuple[Callable[..., Any], list[int]]:
        changed: list[int] = []  # by tracing: only these leave the graph, most models have none

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
                self._refuse_new_arrays()
                after = self._arrays.read()
                changed[:] = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a is not b]
                if _operations(before) != operations:  # of all at once, for it is rare
                    # value_and_grad differentiates with respect to copies: one operation is none of the forward pass.
                    edited = (i for i, a in enumerate(before) if _operations([a]) > (i < self._trainable))
                    changed[:] = sorted({*changed, *edited})
                rest.extend((aux, [after[i] for i in changed], weight))
                return loss

            values, before = self._arrays.read(), self._structure.snapshot()
            try:
                loss, gradients = mx.value_and_grad(forward)(arrays[: self._trainable])
            except BaseException:
                self._structure.restore(before, attributes=True)
                raise
            self._structure.restore(before)
            for i in changed:
                if i >= self._trainable:
                    self._assigned.setdefault(self._arrays.paths[i], values[i])
            aux, after, weight = rest
            return loss, aux, after, gradients, weight

        return random_state.compiled(gradient), changed

    def _refuse_new_arrays(self) -> None:
        if not self._structure.intact():
            new = {path for path, *_ in Structure(self._model).leaves} - {p for p, *_ in self._structure.leaves}
            raise InputError(
                f"loss_fn changed the structure of the model ({', '.join(sorted(new)) or 'replaced a container'});"
                " what the forward pass assigns must exist before make_step, so create it in __init__"
            )


def _operations(arrays: list[mx.array]) -> int:
    """How many operations arrays are the result of; while tracing, none for an input.

    Assigning in place, as ``self.count += 1`` does, changes the array object itself, so that only this tells.
    """
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    return graph.getvalue().count("shape=rectangle")
