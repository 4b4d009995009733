"""The peak memory of a graph that is not evaluated: MLX's order of evaluation, followed with sizes instead of arrays.

MLX tells a callback of ``mx.export_function`` the operations of a graph with their shapes. From these, `peak` follows
what MLX 0.32 does with them: ``mx.compile`` fuses elementwise operations, so that what is between them is never
written; the evaluation goes through the graph in an order; and memory of a dead input is taken for an output of that
size. On the CPU one thread allocates and another computes. The first one is ahead of the second, so memory is allocated
for operations that come later while that of earlier ones is not free yet.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import mlx.core as mx

from .mlx_graph import FREE

# How far allocation is ahead: MLX waits when more than ten tasks, of ten calls each, are queued. An operation is two
# calls, one of which only keeps the inputs; one that moves no bytes is one.
AHEAD = 110
AHEAD_TWO = 165  # of two threads that compute, one of which may be further behind; measured
AHEAD_GPU = 20  # ten kernels, as large ones are submitted one by one; not measured
WIDTH = 20  # of MLX's tape, breadth first
DEPTH = 11  # of a kernel of mx.compile
VIEWS = FREE - {"Contiguous"} | {"Copy"}
_COPYING = {"Reshape", "Flatten", "Unflatten"}
_STRIDED = {"AsStrided", "Broadcast", "BroadcastAxes", "Slice", "Split", "Transpose"}
_FUSED = {
    *("Abs", "ArcCos", "ArcSin", "ArcTan", "ArcTan2", "AsType", "Ceil", "Cos", "Cosh", "Erf", "ErfInv", "Exp", "Expm1"),
    *("Floor", "Log", "Log1p", "Log2", "Log10", "LogicalNot", "Negative", "Remainder", "Round", "Rsqrt", "Sigmoid"),
    *("Sign", "Sin", "Sinh", "Sqrt", "Square", "Tan", "Tanh", "Add", "Divide", "Equal", "Greater", "GreaterEqual"),
    *("Less", "LessEqual", "LogicalAnd", "LogicalOr", "LogAddExp", "Maximum", "Minimum", "Multiply", "NotEqual"),
    *("Power", "Subtract", "BitwiseBinary", "BitwiseInvert", "Select"),
}
_IN_PLACE = {*_FUSED, "Softmax", "Scatter", "ScatterAxis", "SliceUpdate", "Scan"}


class Operation(NamedTuple):
    """An operation of a graph, or a kernel of several."""

    name: str
    inputs: list[str]
    outputs: list[str]


class Graph(NamedTuple):
    """Operations in an order in which each comes after its inputs, and shape and bytes of every array by its name."""

    operations: list[Operation]
    shape: dict[str, tuple[int, ...]]
    nbytes: dict[str, int]
    inputs: list[str]
    outputs: list[str]


def traced(function: Callable[..., Any], *arrays: mx.array) -> Graph:
    """The graph of ``function(*arrays)``, a list of arrays. Nothing is evaluated."""
    told: list[dict[str, Any]] = []
    its = vars(mx)
    contiguous = its["contiguous"]
    its["contiguous"] = _exportable
    try:
        mx.export_function(told.append, function, *arrays)
    finally:
        its["contiguous"] = contiguous
    graph = Graph([], {}, {}, [], [])
    for each in told:
        names = {end: [name for name, *_ in each.get(end, [])] for end in ("inputs", "outputs")}
        for name, shape, dtype in [*each.get("inputs", []), *each.get("outputs", [])]:
            graph.shape[name], graph.nbytes[name] = tuple(shape), math.prod(shape) * dtype.size
        if each["type"] == "primitive":
            graph.operations.append(Operation(each["name"], **names))
        elif each["type"] in names:
            getattr(graph, each["type"]).extend(names[each["type"]])
    return graph


def _exportable(x: mx.array, allow_col_major: bool = False, *, stream: Any = None) -> mx.array:
    """``mx.contiguous``, which MLX cannot export: an operation that copies, or does not, in the same cases."""
    with mx.stream(stream or mx.default_stream(mx.default_device())):
        return mx.depends([x], [x])[0] if allow_col_major else x.flatten().reshape(x.shape)


def peak(graph: Graph, owned: Mapping[str, bool] = MappingProxyType({}), streams: int = 1) -> int:
    """The most bytes that are allocated at once while ``graph`` is evaluated, without those of other inputs than owned.

    Nothing but the graph refers to the inputs ``owned``, so their memory is free when the last operation has read them.
    The values say whether an input is strided: its elements are not in the order of the memory. A CPU computes in one
    or two ``streams``.

    >>> def squares(x):
    ...     return [mx.exp(x @ x) @ x]  # the exponentials take the memory of the product
    >>> peak(traced(squares, mx.zeros((256, 256))))
    524288
    """
    return _followed(fused(graph), owned, streams).most


def strided(graph: Graph) -> list[bool]:
    """Whether the elements of each output of ``graph`` are in another order than that of the memory.

    >>> strided(traced(lambda x: [x + 1, (x + 1).T], mx.zeros((2, 3))))
    [False, True]
    """
    found = _followed(graph, {}, 1).strided
    return [name in found for name in graph.outputs]


def fused(graph: Graph) -> Graph:
    """The graph as ``mx.compile`` makes it: an elementwise operation joins the kernel of all that need its result."""
    users: defaultdict[str, list[int]] = defaultdict(list)
    for i, operation in enumerate(graph.operations):
        for name in operation.inputs:
            users[name].append(i)
    kept = set(graph.outputs)
    kernel: dict[int, int] = {}  # of each operation, by the last one in it
    depth: dict[int, int] = {}
    parts: dict[int, list[int]] = {}
    for i in reversed(range(len(graph.operations))):
        operation = graph.operations[i]
        its_users = [user for made in operation.outputs for user in users[made]]
        around = {kernel[user] for user in its_users}
        below = 1 + max((depth[user] for user in its_users), default=0)
        last = around.pop() if len(around) == 1 else i
        end = graph.operations[last]
        joins = (
            last != i
            and operation.name in {*_FUSED, "Broadcast"}
            and end.name in _FUSED
            and below < DEPTH
            # An output joins as a further output of the kernel.
            and (kept.isdisjoint(operation.outputs) or graph.shape[operation.outputs[0]] == graph.shape[end.outputs[0]])
        )
        kernel[i], depth[i] = (last, below) if joins else (i, 0)
        parts.setdefault(kernel[i], []).append(i)
    found = []
    for last in sorted(parts):
        inside = [graph.operations[i] for i in reversed(parts[last])]
        made = {name for part in inside for name in part.outputs}
        inputs = dict.fromkeys(name for part in inside for name in part.inputs if name not in made)
        outputs = [name for part in inside[:-1] for name in part.outputs if name in kept]
        found.append(Operation(inside[-1].name, list(inputs), [*outputs, *inside[-1].outputs]))
    return graph._replace(operations=found)


def _followed(graph: Graph, owned: Mapping[str, bool], streams: int) -> _Memory:
    memory = _Memory(graph, owned, streams)
    for operation in _tape(graph):
        memory.follow(operation)
    return memory


def _tape(graph: Graph) -> list[Operation]:
    """The order of evaluation: from the outputs, breadth first up to a width, and then backwards."""
    maker = {name: operation for operation in graph.operations for name in operation.outputs}
    root = Operation("", graph.outputs, [])
    needed = [maker[name] for each in [root, *graph.operations] for name in each.inputs if name in maker]
    degree = Counter(map(id, needed))
    tape, waiting, i = [root], list[tuple[Operation, int]](), 0
    while i < len(tape) or waiting:
        if i < len(tape):
            operation, j, i = tape[i], 0, i + 1
        else:
            operation, j = waiting.pop()
        for k in range(j, len(operation.inputs)):
            if (made := maker.get(operation.inputs[k])) is None:
                continue
            if len(tape) - i >= WIDTH:
                waiting.append((operation, k))
                break
            degree[id(made)] -= 1
            if not degree[id(made)]:
                tape.append(made)
    return tape[:0:-1]


class _Memory:
    """The buffers that are allocated while operations are followed, one after the other."""

    def __init__(self, graph: Graph, owned: Mapping[str, bool], streams: int) -> None:
        self.strided = {name for name, is_strided in owned.items() if is_strided}
        self._graph = graph
        self._left = Counter(name for operation in graph.operations for name in operation.inputs)
        self._left.update(graph.outputs)
        self._buffer: dict[str, str] = {}  # of each array the allocated one; none for inputs of the graph
        self._arrays: Counter[str] = Counter()  # alive, for each buffer
        self._read: dict[str, int] = {}  # the last call that reads a buffer
        self._freed: deque[tuple[int, int]] = deque()  # the last call that needs it, and the bytes
        self._now = self._calls = 0
        self._ahead = AHEAD_GPU if mx.default_device() != mx.cpu else AHEAD if streams == 1 else AHEAD_TWO
        for name in owned:
            self._buffer[name] = self._allocated(name)
            self._arrays[name] = 1
        self.most = self._now

    def follow(self, operation: Operation) -> None:
        """Allocates the outputs, and frees the inputs that no other operation needs."""
        while self._freed and self._freed[0][0] <= self._calls - self._ahead:
            self._now -= self._freed.popleft()[1]
        name, inputs = operation.name, operation.inputs
        view = name in VIEWS and not (name in _COPYING and inputs[0] in self.strided)
        self._calls += 1 if view else 2
        dying = [each for each in dict.fromkeys(inputs) if self._left[each] == inputs.count(each)]
        for k, made in enumerate(operation.outputs):
            if view:
                source = inputs[min(k, len(inputs) - 1)] if name == "Depends" else inputs[0]
                if source in self.strided or self._strides(name, source, made):
                    self.strided.add(made)
                own = self._buffer.get(source)
            else:
                own = self._donated(dying, made) if name in _IN_PLACE and len(operation.outputs) == 1 else None
                own = own or self._allocated(made)
            if own is not None:
                self._buffer[made] = own
                self._arrays[own] += 1
        self.most = max(self.most, self._now)
        written = {self._buffer.get(made) for made in operation.outputs}
        for each in inputs:
            self._left[each] -= 1
            if (own := self._buffer.get(each)) is not None and own not in written:  # MLX keeps the other inputs only
                self._read[own] = self._calls
        for each in [*dying, *(made for made in operation.outputs if not self._left[made])]:
            self._free(each)

    def _strides(self, name: str, source: str, made: str) -> bool:
        """Whether a view of an array whose elements are in order skips some, or changes their order."""
        before, after = self._graph.shape[source], self._graph.shape[made]
        if name in ("Slice", "Split"):  # of some rows it is in order
            cut = [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
            return bool(cut) and math.prod(after[: cut[-1]]) > 1
        return name in _STRIDED

    def _donated(self, dying: Iterable[str], made: str) -> str | None:
        """The buffer of an input that nothing else needs, or is still reading, and that has the right size."""
        for own in (self._buffer[each] for each in dying if each in self._buffer):
            idle = self._read.get(own, -self._ahead) <= self._calls - self._ahead
            if idle and self._arrays[own] == 1 and self._graph.nbytes[own] == self._graph.nbytes[made]:
                return own
        return None

    def _allocated(self, made: str) -> str:
        self._now += self._graph.nbytes[made]
        return made

    def _free(self, array: str) -> None:
        if (own := self._buffer.get(array)) is None:
            return
        self._arrays[own] -= 1
        if not self._arrays[own]:
            self._freed.append((self._calls, self._graph.nbytes[own]))
