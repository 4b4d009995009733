"""The modules that loss_fn uses besides the model that is trained: a discriminator, a teacher, a reference model.

Their arrays become inputs of the gradient graph. Otherwise a trace would keep the weights of its first call for ever.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from types import CodeType
from typing import Any

import mlx.nn as nn

from ..base import Structure


def other_models(loss_fn: Any, model: nn.Module) -> Structure:
    """The modules that ``loss_fn`` refers to, without ``model`` and the modules in it.

    Modules are found in variables of functions (globals, closures and defaults), in arguments of ``partial``, in
    attributes of the object of a method, and in dictionaries, lists and tuples there.
    """
    own = {id(module) for module in Structure(model).modules}
    found = {id(module): module for module in _modules(loss_fn, set()) if id(module) not in own}
    return Structure(list(found.values()), freezing=False)


def _modules(node: Any, seen: set[int]) -> Iterator[nn.Module]:
    """The modules in a function, or in the object of a method. A container is searched one level deep."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, nn.Module):
        yield node
    elif inspect.ismethod(node):
        yield from _modules(node.__self__, seen)
        yield from _modules(node.__func__, seen)
    elif isinstance(node, partial):
        for value in (node.func, *node.args, *node.keywords.values()):
            yield from _modules(value, seen)
    elif inspect.isfunction(node):
        for value in _variables(node):
            yield from _modules(value, seen)
    elif isinstance(node, (dict, list, tuple)):
        yield from (
            value for value in (node.values() if isinstance(node, dict) else node) if isinstance(value, nn.Module)
        )
    elif hasattr(node, "__dict__") and not inspect.ismodule(node) and not isinstance(node, type):
        yield from (value for value in vars(node).values() if isinstance(value, nn.Module))
        if inspect.isfunction(call := inspect.getattr_static(type(node), "__call__", None)):
            yield from _modules(call, seen)


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
