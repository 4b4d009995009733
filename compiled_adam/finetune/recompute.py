"""Gradient checkpointing: the backward pass computes what is inside a layer again, so only inputs of layers are kept.

``mx.checkpoint`` does that for a function. Here it is done for the layers of a model, of any classes, and in an order:
the gradient that a layer hands down waits for the gradients of the layer's own parameters. Else MLX may compute the
activations of the next layer before those of this one are free; measured, one more layer was alive then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..base import Places, along, random_state


@contextmanager
def recomputed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the block each of these layers is computed again in a backward pass, with the same results.

    A layer may have any positional and keyword arguments and return arrays in lists, tuples and dictionaries. It is
    differentiated with respect to its trainable parameters and the arrays of floats in its arguments. A call with an
    object among the arguments, such as a cache of keys and values, is an ordinary call: a second one would change the
    object twice. Random numbers, as of dropout, are the same both times.
    """
    with replaced(layers, _recomputing):
        yield


@contextmanager
def replaced(layers: Sequence[nn.Module], by: Callable[..., Any]) -> Iterator[None]:
    """Inside the block ``layer(*args, **kwargs)``, of each of these, is ``by(layer, call, args, kwargs)``.

    ``call`` is the layer's own ``__call__``, which is called as ``call(layer, *args, **kwargs)``.
    """
    before = [(layer, type(layer)) for layer in layers]
    classes = {kind: _subclass(kind, by) for _, kind in before}
    # The class of these objects, and not the method of their class: other models have layers of the same class.
    try:
        for layer, kind in before:
            layer.__class__ = classes[kind]
        yield
    finally:
        for layer, kind in before:
            layer.__class__ = kind


def _subclass(kind: type[nn.Module], by: Callable[..., Any]) -> type[nn.Module]:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return by(self, kind.__call__, args, kwargs)

    return type(kind.__name__, (kind,), {"__call__": __call__})


class Call:
    """A call of a layer as a function of arrays: its trained parameters, and the floats in its arguments."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self._layer, self._call, self._arguments = layer, call, (args, kwargs)
        self.trained = places_of(layer.trainable_parameters(), layer)
        self.inputs = [*self.trained.read(), *floats(self._arguments)]

    def __call__(self, inputs: Sequence[mx.array]) -> Any:
        """The result for these ``inputs``."""
        count = len(self.trained)
        args, kwargs = with_floats(self._arguments, iter(inputs[count:]))
        with holding(self.trained, inputs[:count]):
            return self._call(self._layer, *args, **kwargs)

    def gradients(self, found: Sequence[mx.array]) -> tuple[list[mx.array], list[mx.array]]:
        """Those of the parameters, and those of the arguments, which wait for them."""
        own, given = list(found[: len(self.trained)]), found[len(self.trained) :]
        # One by one: what nobody asks for, as the gradient of a mask, is not computed.
        return own, [mx.depends([each], own)[0] for each in given]


def _recomputing(layer: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if not all(leaf is None or isinstance(leaf, (mx.array, str, int, float)) for leaf in _leaves((args, kwargs))):
        return call(layer, *args, **kwargs)
    of_arrays = Call(layer, call, args, kwargs)
    result: Any = None
    key = random_state.get()

    @mx.custom_function
    def checkpointed(inputs: list[mx.array]) -> list[mx.array]:
        nonlocal result
        result = of_arrays(inputs)
        return floats(result)

    @checkpointed.vjp
    def gradients(primals: Any, cotangents: Any, outputs: Any) -> list[mx.array]:
        # Nothing is computed again before the backward pass is here. A mask would else stay from the first pass.
        *primals, its_key = mx.depends([*primals, key], cotangents)
        with random_state.repeated(its_key):
            _, found = mx.vjp(lambda *inputs: floats(of_arrays(inputs)), primals, cotangents)
        own, given = of_arrays.gradients(found)
        return [*own, *given]

    outputs: Any = checkpointed(of_arrays.inputs)
    return with_floats(result, iter(outputs))


def places_of(tree: Any, module: nn.Module) -> Places:
    """The places in ``module`` of the arrays of ``tree``. A tied module has two paths, and counts once."""
    found = {(id(container), key): (path, container, key) for path, container, key in along(tree, module)}
    return Places(list(found.values()))


@contextmanager
def holding(places: Places, arrays: Sequence[mx.array]) -> Iterator[None]:
    """Inside the block these ``arrays`` are at the ``places``."""
    before = places.read()
    try:
        places.write(arrays)
        yield
    finally:
        places.write(before)


def floats(tree: Any) -> list[mx.array]:
    """The arrays of floats in lists, tuples and dictionaries."""
    return [leaf for leaf in _leaves(tree) if _is_float(leaf)]


def with_floats(tree: Any, floats: Iterator[mx.array]) -> Any:
    """The tree with other arrays of floats."""
    return tree_map(lambda leaf: next(floats) if _is_float(leaf) else leaf, tree)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def _leaves(tree: Any) -> list[Any]:
    found: list[Any] = []
    tree_map(found.append, tree, is_leaf=lambda each: isinstance(each, nn.Module))  # which is a dictionary
    return found
