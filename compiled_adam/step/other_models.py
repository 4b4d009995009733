"""The modules that loss_fn uses besides the model that is trained: a discriminator, a teacher, a reference model.

Their arrays become inputs of the gradient graph. Otherwise a trace would keep the weights of its first call for ever.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from functools import partial
from types import CodeType
from typing import Any

import mlx.nn as nn

from ..base import Structure


def other_models(loss_fn: Any, model: nn.Module) -> Structure:
    """The modules that ``loss_fn`` refers to, without ``model`` and the modules in it."""
    own = {id(module) for module in Structure(model).modules}
    found = {id(module): module for module in referred(loss_fn, nn.Module) if id(module) not in own}
    return Structure(list(found.values()), freezing=False)


def referred(loss_fn: Any, kinds: type | tuple[type, ...]) -> Iterator[Any]:
    """The objects of these ``kinds`` to which a function, or the functions that it calls, refer.

    They are found in variables of functions (globals, closures, defaults), in arguments of ``partial``, in attributes
    of the object of a method, and in dictionaries, lists and tuples there, which are searched one level deep.
    """
    return _referred(loss_fn, kinds, set())


def _referred(node: Any, kinds: type | tuple[type, ...], seen: set[int]) -> Iterator[Any]:
    if id(node) in seen:
        return
    seen.add(id(node))
    below: list[Any] = []
    inside: Iterable[Any] = ()
    if isinstance(node, kinds):
        yield node
    elif inspect.ismethod(node):
        below = [node.__self__, node.__func__]
    elif isinstance(node, partial):
        below = [node.func, *node.args, *node.keywords.values()]
    elif inspect.isfunction(node):
        below = list(_variables(node))
    elif isinstance(node, (dict, list, tuple)):
        inside = node.values() if isinstance(node, dict) else node
    elif hasattr(node, "__dict__") and not inspect.ismodule(node) and not isinstance(node, type):
        inside = vars(node).values()
        if inspect.isfunction(call := inspect.getattr_static(type(node), "__call__", None)):
            below = [call]
    yield from (value for value in inside if isinstance(value, kinds))
    for each in below:
        yield from _referred(each, kinds, seen)


def _variables(function: Any) -> Iterator[Any]:
    """The present values of the variables of a Python function that come from outside."""
    yield from (function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__)
    yield from (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def _names(code: CodeType) -> set[str]:
    """The names that a function and the functions within it read."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))
