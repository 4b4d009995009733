"""The lowering of the update: how MLX runs the update of a leaf (one parameter array) in kernels.

Nothing here changes the results, except for rounding. The rest of this folder calls `of_leaves`, `Runner`, `in_place`,
`square_root` and `unfused`, and has the algorithm only. Train steps call `row_major`.

"fused"     One kernel with three outputs. Each array is read and written once: 28 bytes per float32 parameter. MLX
            gives each output of such a kernel new memory, as much as all parameters and moments together.
"inplace"   One kernel each for ``m``, ``v`` and the weight: 40 bytes per float32 parameter, but no new memory. MLX lets
            a kernel with a single output overwrite an input that is not needed elsewhere.

On a GPU the number of bytes decides, so "auto" is "fused". On the CPU g++ does not vectorize a loop with three outputs.
So "auto" is "inplace" for leaves from `LARGE` elements; below that a kernel costs more than its loop. The CPU backend
has one thread per stream, so "auto" and "inplace" divide the large leaves between two streams. On Linux g++ does not
vectorize a loop with a square root either. So "auto" uses Heron's method there. The first guesses take 2 bytes per
parameter of the leaves in progress.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import mlx.core as mx

from .moments import Stored, leading_ones

LOWERINGS = ("auto", "fused", "inplace")
LARGE = 1 << 15
SLOW_SQRT = sys.platform == "linux"

T = TypeVar("T")
_second = threading.local()  # an MLX stream belongs to the thread that made it


class Lowering(NamedTuple):
    """How and where the update of one leaf runs."""

    inplace: bool
    stream: mx.Stream
    second: bool = False  # whether ``stream`` is the second stream and not the default stream
    heron: bool = False  # whether the square root is computed by Heron's method


def of_leaves(choice: str, sizes: Sequence[int]) -> list[Lowering]:
    """The lowering of each leaf on the default device. ``sizes`` has the number of elements of each leaf."""
    streams = [mx.default_stream(mx.default_device())]
    shared = choice != "fused" and streams[0].device.type == mx.DeviceType.cpu
    if shared:
        streams.append(_second_stream())
    load = [0] * len(streams)
    lowerings = []
    for size in sizes:
        if not shared or size < LARGE:
            lowerings.append(Lowering(choice == "inplace", streams[0]))
            continue
        least = load.index(min(load))
        load[least] += size
        heron = choice == "auto" and SLOW_SQRT
        lowerings.append(Lowering(True, streams[least], second=least > 0, heron=heron))
    return lowerings


def _second_stream() -> mx.Stream:
    if not hasattr(_second, "stream"):
        _second.stream = mx.new_stream(mx.cpu)
    return _second.stream


def row_major(gradient: mx.array, stream: mx.Stream) -> mx.array:
    """The gradient of a large leaf, in the order of memory that parameters and moments have.

    MLX gives the gradient of ``nn.Linear`` as a transposed view. A kernel of the CPU reads such an array element by
    element, and each of the update's kernels reads it again: 36 ns an element in float32, and 26 with this copy. It
    copies nothing that is in order, except for parts of a larger array, as the sums over workers are. A GPU reads any
    order.
    """
    if gradient.size < LARGE or gradient.ndim < 2 or stream.device.type != mx.DeviceType.cpu:
        return gradient
    return mx.contiguous(gradient, stream=stream)


class Runner(Generic[T]):
    """Runs the update of each leaf on the stream that its `Lowering` names.

    ``shared`` has the arrays that all leaves read. ``copy`` makes the same arrays from new nodes of the graph, for the
    second stream: every read of an array of another stream would wait for that stream again.
    """

    def __init__(self, shared: T, copy: Callable[[T], T], parameters: Sequence[mx.array]) -> None:
        self._copy = copy
        self._shared = {False: shared}  # key: whether the arrays are for the second stream
        # By the same key: of each large leaf the elements of the stream up to its end, and its new weight.
        self._done: dict[bool, list[tuple[int, mx.array]]] = {False: [], True: []}
        # MLX merges two broadcasts of a constant to the same shape, also on different streams. A kernel cannot fuse an
        # array of another stream: it would wait for the constant, read it as a strided array, and be twice as slow.
        # So on the second stream all shapes begin with additional axes of length one, and are never the same.
        self._front = (1,) * (1 + max((leading_ones(p.shape) for p in parameters), default=0))

    def run(
        self,
        how: Lowering,
        leaf: Callable[[T, mx.array, mx.array, Stored], tuple[mx.array, Stored]],
        gradient: mx.array,
        parameter: mx.array,
        state: Stored,
    ) -> tuple[mx.array, Stored]:
        """Runs ``leaf(shared, gradient, parameter, state)``. The new parameter and state keep the old shapes."""
        front = self._front if how.second else ()
        in_turn = how.inplace and parameter.size >= LARGE and how.stream.device.type == mx.DeviceType.cpu
        with mx.stream(how.stream):
            if how.second not in self._shared:
                self._shared[how.second] = self._copy(self._shared[False])
            if in_turn and (before := self._before(how.second)):
                (gradient,) = mx.depends([gradient], before)
            new, stored = leaf(
                self._shared[how.second],
                gradient.reshape((*front, *gradient.shape)),
                parameter.reshape((*front, *parameter.shape)),
                {name: array.reshape((*front, *array.shape)) for name, array in state.items()},
            )
            stored = {name: array.reshape(state[name].shape) for name, array in stored.items()}
            new = new.reshape(parameter.shape)
        if in_turn:
            done = self._done[how.second]
            done.append((parameter.size + (done[-1][0] if done else 0), new))
        return new, stored

    def _before(self, second: bool) -> list[mx.array]:
        """The weights that are updated before the next large leaf of a stream.

        The last of the stream itself: then the moments are in the cache when the kernel of their weight reads them,
        while MLX would compute all moments first. And the last of the other stream that ends before the leaf begins,
        so that nobody waits for it: else MLX could put all leaves of one stream into its queues, which hold about a
        hundred operations together, while the other stream has none.
        """
        own, other = self._done[second], self._done[not second]
        earlier = [weight for end, weight in other if own and end < own[-1][0]]
        return [weight for _, weight in own[-1:]] + earlier[-1:]


def in_place(moments: Callable[[mx.array], tuple[mx.array, mx.array]], gradient: mx.array) -> tuple[mx.array, mx.array]:
    """``moments(gradient)`` with a separate kernel for ``m`` and for ``v``. Each can overwrite the old moment."""
    m, _ = moments(gradient)
    # `unfused` makes a second graph node of the gradient. With one node MLX would cast and clip the gradient in a
    # third kernel, and write the result to memory for the other two.
    _, v = moments(unfused(gradient))
    return unfused(m), unfused(v)


def square_root(v: mx.array, heron: bool) -> mx.array:
    """The square root of ``v``, float32."""
    return _heron(v, _root_guess(v)) if heron else mx.sqrt(v)


def unfused(x: mx.array) -> mx.array:
    """``x``, computed in a separate kernel and not fused into the kernels that use it.

    MLX fuses a chain of scalar operations into a single consumer, and then computes the chain once per element: a
    model with one parameter would compute two expm1 for each weight. ``contiguous`` is not fusable, and copies nothing.
    """
    return mx.contiguous(x, allow_col_major=True)


def _root_guess(v: mx.array) -> mx.array:
    """The square root of each element of ``v`` (float32, not negative) within 4 %, as bfloat16.

    It shifts the upper half of the bits by one. This halves the exponent, and changes the mantissa almost as a root.

    >>> _root_guess(mx.array([1.0, 2.0, 1e-20])).tolist()
    [0.984375, 1.46875, 9.913492249324918e-11]
    """
    return ((v.view(mx.uint32) >> 17) + 0x1FBC).astype(mx.uint16).view(mx.bfloat16)


def _heron(v: mx.array, guess: mx.array) -> mx.array:
    """The square root of ``v``, float32, from ``_root_guess(v)``: two steps of Heron's ``(r + v / r) / 2``.

    With g++ this loop takes a third of the time of a loop with square roots, which must set ``errno`` for negative
    numbers. A Heron step never gives too small a root. The first step is at most 0.07 % too large. With the mean error
    subtracted, the second step is right to 1.1 * 2^-24 before rounding. If ``v`` is 0 or denormal, the root is up to
    2e-20 too large.

    >>> _heron(v := mx.array([0.0, 4.0, 1e10, float('inf')]), _root_guess(v)).tolist()
    [1.989815275238986e-20, 2.0, 100000.0, inf]
    """
    guess = guess.astype(mx.float32)
    twice = guess + mx.minimum(v, 3.4e38) / guess  # finite, so that infinity is not divided by itself
    return 0.24991056 * twice + (1.0003579 * v) / twice
