"""The forward and backward pass: a compiled function per batch signature. The least recently used is dropped first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..base import Compiled, InputError, Places, Structure, is_evaluated, operations, undone_on_error
from . import signature as batches
from .draws import without_draws
from .settings import LossFunction, Settings


class Gradients(NamedTuple):
    """The results of the forward and backward pass of a batch. All arrays are lazy."""

    loss: mx.array
    aux: list[Any]
    assigned: dict[int, mx.array]  # arrays that the forward pass has assigned, by the index among the model's arrays
    gradients: list[mx.array]
    weight: mx.array


class GradientGraphs:
    """The gradient of ``loss_fn`` for a model and the ``others`` that it uses.

    Their arrays are at the places ``arrays``. The first ``trainable`` of these are parameters. ``pack`` makes of their
    gradients what the update needs. ``made`` and ``evicted`` count traces.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        structure: Structure,
        others: Structure,
        arrays: Places,
        trainable: int,
        settings: Settings,
        pack: Callable[[list[mx.array]], list[mx.array]],
    ) -> None:
        self._model, self._loss_fn, self._settings, self._pack = model, loss_fn, settings, pack
        self._structure, self._others, self._arrays, self._trainable = structure, others, arrays, trainable
        self._modules = [*structure.modules, *others.modules]
        self.made = self.evicted = 0
        self._compiled: OrderedDict[Hashable, Compiled] = OrderedDict()

    def __call__(self, signature: Hashable, batch: list[mx.array]) -> Gradients:
        # Layers read `training` while they are traced, so a trace is valid for one value of each flag only.
        key = signature, tuple([module.training for module in self._modules])
        graph = self._compiled.get(key)
        if graph is None:
            while len(self._compiled) >= self._settings.max_traces:
                self._compiled.popitem(last=False)
                self.evicted += 1
            graph = self._compile(signature)
        gradients = Gradients(*graph(self._arrays.read(), batch))
        self._compiled[key] = graph
        self._compiled.move_to_end(key)
        return gradients

    def _compile(self, signature: Hashable) -> Compiled:
        def gradient(arrays: list[mx.array], batch: list[mx.array]) -> Any:
            self.made += 1
            args, kwargs = batches.rebuild(signature, iter(batch))
            # All results except the loss are passed out in a list. value_and_grad would put a stop_gradient on further
            # outputs, and mx.compile then loses outputs (IndexError) if a cast occurs in the loss as well.
            rest: list[Any] = []

            def forward(parameters: list[mx.array]) -> mx.array:
                before = [*parameters, *arrays[self._trainable :]]
                before_it = operations(before)
                self._arrays.write(before)
                output = without_draws(lambda: self._loss_fn(self._model, *args, **kwargs), self._loss_fn)
                loss, aux, weight = _taken_apart(output, self._settings.weighted)
                self._follow_structure()
                after = self._arrays.read()
                changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a is not b]
                if operations(before) != before_it:  # an array was edited in place: rare, so one check for all
                    # value_and_grad differentiates with respect to copies: one operation is that copy, no edit.
                    edited = (i for i, a in enumerate(before) if operations([a]) > (i < self._trainable))
                    changed = sorted({*changed, *edited})
                # The graph returns only changed arrays; most models have none. MLX keeps the indices with the trace.
                rest.extend((aux, {i: after[i] for i in changed}, weight))
                return loss

            originals, put_back = self._arrays.read(), self._structure.snapshot()
            put_others_back = self._others.snapshot()

            def undo() -> None:
                put_back()
                put_others_back()

            def traced() -> Any:
                found = mx.value_and_grad(forward)(arrays[: self._trainable])
                # Changes that the forward pass made to other things than arrays stay, as they do without a step.
                self._arrays.write(originals)
                return found

            loss, gradients = undone_on_error(traced, undo)
            aux, assigned, weight = rest
            if self._settings.accumulate == 1:
                gradients = self._pack(gradients)  # a window has one sum per parameter
            return loss, aux, assigned, gradients, weight

        return Compiled(gradient, self._settings.max_traces, draws=True)

    def _follow_structure(self) -> None:
        """Accepts new arrays, such as a cached mask, that depend on neither batch nor parameters. Raises for others."""
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
                " an array that the forward pass assigns must exist before make_step, so create it in __init__"
            )


def _taken_apart(output: Any, weighted: bool) -> tuple[mx.array, list[Any], mx.array]:
    """The output of loss_fn as (loss, aux, weight). Raises an error that says what to return instead."""
    if isinstance(output, dict) and "loss" in output:
        output = output["loss"], {name: value for name, value in output.items() if name != "loss"}
    loss, *aux = output if isinstance(output, (tuple, list)) and output else (output,)
    if not isinstance(loss, mx.array):
        raise TypeError(
            f"loss_fn returned {type(loss).__name__} as the loss; return an mx.array of shape (),"
            " a tuple that begins with one, or a dict that has one as 'loss'"
        )
    if loss.shape != ():
        raise InputError(f"loss_fn returned a loss of shape {loss.shape}; reduce it to a scalar, as with .mean()")
    if not mx.issubdtype(loss.dtype, mx.floating):
        raise TypeError(f"loss_fn returned a loss of dtype {loss.dtype}; return a float")
    if not weighted:
        return loss, aux, mx.array(1.0)
    if not aux:
        raise InputError("weighted=True needs loss_fn to return (loss, weight, ...); it returned the loss alone")
    weight = aux[0]
    if isinstance(weight, bool) or not isinstance(weight, (mx.array, int, float)):
        raise TypeError(f"loss_fn returned {type(weight).__name__} as the weight; return a 0-d array or a number")
    weight = mx.array(weight, mx.float32)
    if weight.shape != ():
        raise InputError(f"loss_fn returned a weight of shape {weight.shape}; reduce it to a scalar, as with .sum()")
    return loss, aux, weight
