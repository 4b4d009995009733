"""The kernels of an update and the bytes that each reads and writes, from the graph alone: no device, no clock.

MLX shows a lazily built graph in two ways, and neither says enough. ``export_to_dot`` has the kernels as they will
run, fused, but no shapes. ``export_function`` has every shape and dtype, but refuses fused kernels. So the same
update is built twice, compiled and not, and both graphs are walked from their outputs together: an array in
the one is an array in the other, until a fused kernel hides what is inside; behind it the walk goes on.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx

from compiled_adam.base.mlx_graph import FREE

# fmt: off
# What MLX fuses, beside casts and broadcasts (mlx/compile.cpp).
_ELEMENTWISE = {
    "Abs", "Add", "ArcCos", "ArcCosh", "ArcSin", "ArcSinh", "ArcTan", "ArcTan2", "ArcTanh", "AsType", "BitwiseAnd",
    "BitwiseBinary", "BitwiseInvert", "BitwiseOr", "BitwiseXor", "Broadcast", "Ceil", "Conjugate", "Cos", "Cosh",
    "Divide", "Equal", "Erf", "ErfInv", "Exp", "Expm1", "Floor", "Greater", "GreaterEqual", "Imag", "LeftShift",
    "Less", "LessEqual", "Log", "Log10", "Log1p", "Log2", "LogAddExp", "LogicalAnd", "LogicalNot", "LogicalOr",
    "Maximum", "Minimum", "Multiply", "NaNEqual", "Negative", "NotEqual", "Power", "Real", "Remainder", "RightShift",
    "Round", "Rsqrt", "Select", "Sigmoid", "Sign", "Sin", "Sinh", "Sqrt", "Square", "Subtract", "Tan", "Tanh",
}
# fmt: on
_PARTS = {"AsStrided", "Slice", "Split"}  # the free ones that show a part of an array
_PRIMITIVE = re.compile(r'^\{ (\d+) \[label ?= ?"([^"]+)", shape=rectangle\]', re.M)
_LINE = re.compile(r'^"([^"]+)" -> (\d+)$|^(\d+) -> "([^"]+)"$', re.M)  # array -> primitive, primitive -> array
_MOST_NAMES = 1000  # MLX's Python functions take at most 1024 keywords
_STAND_IN = {"Depends": "Contiguous"}  # see `_exportable`
_REDUCTIONS = {"And", "Or", "Sum", "Prod", "Min", "Max"}  # `export_function` calls them all Reduce


class Kernel(NamedTuple):
    """One kernel of a graph."""

    name: str  # of the primitive; "Compiled..." lists what was fused
    read: int  # bytes
    written: int  # bytes
    estimated: bool  # whether an array between two fused kernels, whose dtype nothing tells, was taken to be float32


class _Node(NamedTuple):
    name: str
    inputs: list[str]
    outputs: list[str]

    @property
    def kind(self) -> str:
        """Its name as `export_function` has it, without "uint16" and the like."""
        word = self.name.split()[0]
        return "Reduce" if word in _REDUCTIONS else word

    @property
    def fused(self) -> bool:
        return self.name.startswith("Compiled")


class _Array(NamedTuple):
    shape: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


class _Graph(NamedTuple):
    makers: dict[str, _Node]  # array -> what computes it
    outputs: list[str]

    def kernels(self) -> list[_Node]:
        """What is needed for the outputs, in an order in which it can be computed."""
        order: dict[int, _Node] = {}
        stack = [(name, False) for name in reversed(self.outputs)]
        opened: set[int] = set()
        while stack:
            name, done = stack.pop()
            node = self.makers.get(name)
            if node is None or (not done and id(node) in opened):
                continue
            if done:
                order[id(node)] = node
            else:
                opened.add(id(node))
                stack.append((name, True))
                stack += [(each, False) for each in reversed(node.inputs)]
        return list(order.values())


def traffic(inputs: Sequence[mx.array], build: Callable[[], Sequence[mx.array]]) -> list[Kernel]:
    """The kernels that compute what ``build`` returns, lazily and from ``inputs``, with the bytes that they move.

    ``build`` is called twice, the second time uncompiled; nothing is computed. Whatever computes ``inputs``
    themselves does not count. An array is read once by a kernel, whatever views and broadcasts of it there are.
    """
    fused = _fused(inputs, build())
    with uncompiled(), _exportable():
        plain, arrays = _plain(build())
    found = _sizes(fused, inputs, plain, arrays)
    return [_kernel(node, fused, found) for node in fused.kernels() if node.kind not in FREE]


def _kernel(node: _Node, graph: _Graph, found: dict[str, tuple[_Array, bool]]) -> Kernel:
    def source(name: str) -> str:
        while (maker := graph.makers.get(name)) and maker.kind in FREE - _PARTS:
            name = maker.inputs[maker.outputs.index(name)]  # Depends has one input for each output, and more
        return name

    read, written = {source(name) for name in node.inputs}, set(node.outputs)
    return Kernel(
        node.name,
        sum(found[name][0].nbytes for name in read),
        sum(found[name][0].nbytes for name in written),
        any(found[name][1] for name in read | written),
    )


def _fused(inputs: Sequence[mx.array], outputs: Sequence[mx.array]) -> _Graph:
    """The graph as `mx.export_to_dot` draws it, cut at ``inputs``: in0, in1, ...; outputs are out0, ..."""
    drawing = _drawing(outputs, {})
    lines = _LINE.findall(drawing)
    names = {f"in{i}": array for i, array in enumerate(inputs)} | {f"out{i}": a for i, a in enumerate(outputs)}
    called: dict[str, str] = {}
    for i in range(0, len(names), _MOST_NAMES):
        # Drawn again, with other names in the same places.
        part = dict(list(names.items())[i : i + _MOST_NAMES])
        for (before, to, by, after), named in zip(lines, _LINE.findall(_drawing(outputs, part)), strict=False):
            if (to, by) != named[1:3]:
                raise RuntimeError("MLX drew the same graph in two orders")
            name = named[0] or named[3]
            if name in part:
                called[before or after] = name
    nodes = {address: _Node(name, [], []) for address, name in _PRIMITIVE.findall(drawing)}
    makers: dict[str, _Node] = {}
    for before, to, by, after in lines:
        if before:
            nodes[to].inputs.append(called.get(before, before))
        else:
            name = called.get(after, after)
            nodes[by].outputs.append(name)
            if not name.startswith("in"):
                makers[name] = nodes[by]
    return _Graph(makers, [f"out{i}" for i in range(len(outputs))])


def _drawing(outputs: Sequence[mx.array], names: dict[str, mx.array]) -> str:
    """In DOT; arrays have the ``names`` given, or letters of MLX's choice."""
    text = io.StringIO()
    mx.export_to_dot(text, *outputs, **names)
    return text.getvalue()


def _plain(outputs: Sequence[mx.array]) -> tuple[_Graph, dict[str, _Array]]:
    """The graph as `mx.export_function` reports it, equal primitives merged as MLX does when it compiles."""
    makers: dict[str, _Node] = {}
    arrays: dict[str, _Array] = {}
    merged: dict[str, str] = {}
    known: dict[str, list[str]] = {}
    results: list[str] = []

    def report(event: dict[str, Any]) -> None:
        for name, *rest in (*event.get("outputs", []), *event.get("constants", [])):
            shape, dtype = rest if len(rest) == 2 else (rest[0].shape, rest[0].dtype)
            arrays[name] = _Array(tuple(shape), dtype.size)
        if event["type"] == "outputs":
            results.extend(name for name, *_ in event["outputs"])
        if event["type"] == "primitive":
            node = _Node(
                _STAND_IN.get(event["name"], event["name"]),
                [merged.get(name, name) for name, *_ in event["inputs"]],
                [name for name, *_ in event["outputs"]],
            )
            key = repr((node.name, node.inputs, event["arguments"], [arrays[name] for name in node.outputs]))
            merged.update(zip(node.outputs, known.setdefault(key, node.outputs), strict=True))
            makers.update(dict.fromkeys(node.outputs, node))

    mx.export_function(report, lambda: list(outputs))
    return _Graph(makers, [merged.get(name, name) for name in results]), arrays


def _sizes(
    fused: _Graph, inputs: Sequence[mx.array], plain: _Graph, arrays: dict[str, _Array]
) -> dict[str, tuple[_Array, bool]]:
    """Every array of ``fused``, and whether its dtype is only assumed."""
    found = {f"in{i}": (_Array(array.shape, array.dtype.size), False) for i, array in enumerate(inputs)}
    pairs = list(zip(fused.outputs, plain.outputs, strict=True))
    while pairs:
        name, twin = pairs.pop()
        if name in found:
            continue
        found[name] = arrays[twin], False
        node, its_twin = fused.makers.get(name), plain.makers.get(twin)
        if node is None or its_twin is None:
            continue
        if not node.fused:
            pairs += [*_zip(node.inputs, its_twin.inputs), *_zip(node.outputs, its_twin.outputs)]
            continue
        ends, twin_ends = _ends(fused, name), _ends(plain, twin)
        for kind, names in ends.items():
            pairs += _zip(names, twin_ends.get(kind, []))
    for node in fused.kernels():
        for name in node.inputs:
            found.setdefault(name, (_Array((), 4), False))  # a number in the program
        for name in node.outputs:
            if name not in found:
                shapes = [found[each][0].shape for each in node.inputs]
                shape = _broadcast(shapes)
                found[name] = _Array(shape, 4), math.prod(shape) > 1
    return found


def _zip(names: list[str], twins: list[str]) -> Iterator[tuple[str, str]]:
    return zip(names, twins, strict=True) if len(names) == len(twins) else iter(())


def _ends(graph: _Graph, name: str) -> dict[str, list[str]]:
    """Where a walk back from an array through what can be fused ends, by the kind of primitive, in the order met."""
    ends: dict[str, list[str]] = {}
    seen: set[str] = set()
    stack = [name]
    while stack:
        name = stack.pop()
        if name in seen:
            continue
        seen.add(name)
        node = graph.makers.get(name)
        if node is None:
            continue  # an input of the graph, or a number
        if node.fused or node.kind in _ELEMENTWISE:
            stack += reversed(node.inputs)
        else:
            ends.setdefault(node.kind, []).append(name)
    return ends


def _broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that all broadcast to; of those that do not, the largest."""
    try:
        return mx.broadcast_shapes(*shapes) if shapes else ()
    except ValueError:
        return max(shapes, key=math.prod)


@contextmanager
def uncompiled() -> Iterator[None]:
    """``mx.compile`` does nothing meanwhile."""
    mx.disable_compile()
    try:
        yield
    finally:
        if "MLX_DISABLE_COMPILE" not in os.environ:
            mx.enable_compile()


@contextmanager
def _exportable() -> Iterator[None]:
    """``mx.contiguous``, which `mx.export_function` refuses, leaves another primitive in the graph instead."""
    original = mx.contiguous
    mx.contiguous = lambda a, allow_col_major=False, *, stream=None: mx.depends([a], [])[0]
    try:
        yield
    finally:
        mx.contiguous = original
