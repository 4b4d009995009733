"""The trainable parameters that a function reads, so that a gradient with respect to them can be asked for.

MLX differentiates with respect to arguments. A head such as ``lambda rows: model.lm_head(rows)`` gets its weights from
modules that it refers to. They are found here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..base import InputError, Places, along, is_evaluated, operations, reached

Place = tuple[str, Any, Any]


def trainable_of(head: Callable[[mx.array], mx.array], sample: mx.array) -> tuple[Places, mx.array]:
    """The places of the trainable parameters on which ``head(sample)`` depends, and ``head(sample)``, not evaluated.

    Modules are found if ``head`` is one, is a method of one, or is a function or ``partial`` that refers to one.

    Raises:
        ValueError: ``head`` refers to a float array that is not evaluated and belongs to no module. No gradient would
            reach it.
    """
    places: dict[tuple[int, Any], Place] = {}
    for held in _held(head, set()):
        if isinstance(held, nn.Module):
            for path, container, key in along(held.trainable_parameters(), held):
                places.setdefault((id(container), key), (path, container, key))
        elif mx.issubdtype(held.dtype, mx.inexact) and (operations([held]) or not is_evaluated(held)):
            # mx.grad differentiates with respect to copies, which are not yet computed.
            raise InputError(
                "head refers to an array that is not computed yet and that is no parameter of a module, so that it"
                " would get no gradient; make it a parameter of an nn.Module, or call mx.eval if it is a constant"
            )
    found = Places(list(places.values()))
    output = head(sample)
    used = reached([output], found.read())
    return Places([place for place, is_used in zip(places.values(), used, strict=True) if is_used]), output


def _held(node: Any, seen: set[int]) -> Iterator[Any]:
    """The modules and arrays to which a function, method, partial or container refers."""
    if id(node) in seen:
        return
    seen.add(id(node))
    below: list[Any] = []
    if isinstance(node, (nn.Module, mx.array)):
        yield node
    elif inspect.ismethod(node):
        below = [node.__self__, node.__func__]
    elif inspect.isfunction(node):
        variables = inspect.getclosurevars(node)
        below = [*variables.nonlocals.values(), *variables.globals.values(), node.__defaults__, node.__kwdefaults__]
    elif isinstance(node, partial):
        below = [node.func, node.args, node.keywords]
    elif isinstance(node, dict):
        below = list(node.values())
    elif isinstance(node, (list, tuple)):
        below = list(node)
    elif hasattr(node, "__dict__") and not inspect.ismodule(node) and not isinstance(node, type):
        below = list(vars(node).values())
    for each in below:
        yield from _held(each, seen)
