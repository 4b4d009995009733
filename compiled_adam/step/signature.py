"""Batches as flat arrays and a hashable signature. Each signature has a gradient trace of its own."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[mx.array], Hashable]:
    """The arrays in the arguments of a call, and the signature: structure, shapes, dtypes and constants.

    Arguments are trees of dicts (and other mappings, which loss_fn gets as dicts), lists and tuples. Calls with equal
    signatures use the same trace. A NumPy array becomes an ``mx.array``. Numbers, strings and None are constants in the
    signature. Any other value raises TypeError; the message says where the value is.

    >>> arrays, signature = flatten((mx.zeros((2, 3)), 7), {"mask": mx.zeros(3)})
    >>> rebuild(signature, iter(["first array", "second"]))
    (('first array', 7), {'mask': 'second'})
    """
    arrays: list[mx.array] = []
    return arrays, (tuple, (_flatten(args, "batch", arrays), _flatten(kwargs, "batch", arrays)))


def _flatten(node: Any, path: str, arrays: list[mx.array]) -> Hashable:
    node = _without_numpy(node, path)
    if isinstance(node, mx.array):
        arrays.append(node)
        return "array", node.shape, node.dtype
    if type(node) in (list, tuple) or (isinstance(node, tuple) and hasattr(node, "_fields")):
        return type(node), tuple(_flatten(item, f"{path}[{i}]", arrays) for i, item in enumerate(node))
    if isinstance(node, Mapping) and not isinstance(node, nn.Module):
        return dict, tuple((key, _flatten(value, f"{path}[{key!r}]", arrays)) for key, value in node.items())
    if isinstance(node, float):
        return "float", node.hex()  # the bits, since 0.0 == -0.0 and nan != nan
    if node is None or isinstance(node, (bool, int, str)):
        return "constant", type(node), node  # with the type, since 1 == True
    if isinstance(node, nn.Module):
        raise TypeError(f"{path} is a module, {type(node).__name__}; let loss_fn use it as a variable from outside")
    raise TypeError(
        f"{path} is {type(node).__module__}.{type(node).__qualname__}; a batch is made of arrays, dicts, lists, tuples,"
        " numbers, strings and None: convert it, for example with mx.array(...)"
    )


def _without_numpy(node: Any, path: str) -> Any:
    """``node``, or an array or number of NumPy as one of MLX or Python."""
    numpy: Any = sys.modules.get("numpy")  # a step needs no NumPy
    if numpy is not None and isinstance(node, numpy.generic):
        return node.item()
    if numpy is None or not isinstance(node, numpy.ndarray):
        return node
    try:
        return mx.array(node)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"{path} is a NumPy array of dtype {node.dtype}, which mx.array cannot be made from; convert it to numbers"
            " with .astype(...), or leave it out of the batch"
        ) from error


def rebuild(signature: Any, arrays: Iterator[Any]) -> Any:
    """The inverse of `flatten`: the tree of ``signature`` with its arrays taken from ``arrays`` in order."""
    kind, *rest = signature
    if kind == "array":
        return next(arrays)
    if kind == "constant":
        return rest[1]
    if kind == "float":
        return float.fromhex(rest[0])
    if kind is dict:
        return {key: rebuild(value, arrays) for key, value in rest[0]}
    items = (rebuild(item, arrays) for item in rest[0])
    return kind(*items) if hasattr(kind, "_fields") else kind(items)
