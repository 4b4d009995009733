"""How MLX is made to run the update of a leaf well: in one kernel, or each array in one that overwrites it.

Nothing here changes what is computed. The rest of this folder calls `of_leaves`, `Runner`, `in_place`, `square_root`
and `unfused`, and reads as the algorithm.

"fused"     One kernel with three outputs: each array is read and written once, 28 bytes per float32 parameter. MLX
            gives each output of such a kernel new memory, as much as all parameters and moments together.
"inplace"   A kernel for each of ``m``, ``v`` and the weight: 40 bytes per float32 parameter, and no memory at all, as
            MLX lets a kernel with a single output write to an input that nobody else needs.

On a GPU the bytes decide, so "auto" is "fused". The CPU backend has one thread for each stream, and g++ leaves a loop
with three outputs scalar; there "auto" is in place for leaves from `LARGE` elements, below which a kernel costs more
than its loop. In both, those leaves are shared out to two streams. On Linux g++ leaves a loop with a square root scalar
too; there "auto" has Heron's method, from guesses that take 2 bytes per parameter of the leaves that are under way.
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
_second = threading.local()  # MLX's streams belong to the thread that made them


class Lowering(NamedTuple):
    """What becomes of one leaf."""

    inplace: bool
    stream: mx.Stream
    second: bool = False  # whether that is not the default stream
    heron: bool = False  # whether the square root is computed by Heron's method


def of_leaves(choice: str, sizes: Sequence[int]) -> list[Lowering]:
    """The lowering of each leaf of so many elements, on the default device."""
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


class Runner(Generic[T]):
    """Runs the update of each leaf on the stream that its `Lowering` names.

    ``shared`` is what all leaves read; ``copy`` makes the same from other nodes of the graph, for what reads an array
    of another stream waits for it, each time again.
    """

    def __init__(self, shared: T, copy: Callable[[T], T], parameters: Sequence[mx.array]) -> None:
        self._copy = copy
        self._shared = {False: shared}  # by whether it is for the second stream
        # MLX merges a constant that is broadcast to the same shape twice, on different streams too. A kernel cannot
        # take in what belongs to another stream: it would read the constant as a strided array, wait for it, and be
        # twice as slow. So on the second stream shapes have axes of one in front, more than on the default stream.
        self._front = (1,) * (1 + max((leading_ones(p.shape) for p in parameters), default=0))

    def run(
        self,
        how: Lowering,
        leaf: Callable[[T, mx.array, mx.array, Stored], tuple[mx.array, Stored]],
        gradient: mx.array,
        parameter: mx.array,
        state: Stored,
    ) -> tuple[mx.array, Stored]:
        """``leaf(shared, gradient, parameter, state)``, the new parameter and state, in the shapes of the old."""
        front = self._front if how.second else ()
        with mx.stream(how.stream):
            if how.second not in self._shared:
                self._shared[how.second] = self._copy(self._shared[False])
            new, stored = leaf(
                self._shared[how.second],
                gradient.reshape((*front, *gradient.shape)),
                parameter.reshape((*front, *parameter.shape)),
                {name: array.reshape((*front, *array.shape)) for name, array in state.items()},
            )
            stored = {name: array.reshape(state[name].shape) for name, array in stored.items()}
            return new.reshape(parameter.shape), stored


def in_place(moments: Callable[[mx.array], tuple[mx.array, mx.array]], gradient: mx.array) -> tuple[mx.array, mx.array]:
    """``moments(gradient)``, each in a kernel of its own, which can overwrite the old one."""
    m, _ = moments(gradient)
    # From another node of the graph: of the same one MLX would cast and clip the gradient once, in a kernel of its own,
    # and write it out for both to read.
    _, v = moments(unfused(gradient))
    return unfused(m), unfused(v)


def square_root(v: mx.array, heron: bool) -> mx.array:
    """The square root of ``v``, float32."""
    return _heron(v, _root_guess(v)) if heron else mx.sqrt(v)


def unfused(x: mx.array) -> mx.array:
    """``x`` itself, computed in a kernel of its own rather than in that of what uses it.

    MLX fuses a chain of scalars into its consumer if there is only one, and then computes it once per element: with a
    single parameter that would be two expm1 for each weight. ``contiguous`` is not fusable, and moves nothing here.
    """
    return mx.contiguous(x, allow_col_major=True)


def _root_guess(v: mx.array) -> mx.array:
    """The square root of each of ``v``, float32 and not negative, within 4 %: bfloat16.

    The upper half of the bits, shifted by one: that halves the exponent, and the mantissa almost as a root does.

    >>> _root_guess(mx.array([1.0, 2.0, 1e-20])).tolist()
    [0.984375, 1.46875, 9.913492249324918e-11]
    """
    return ((v.view(mx.uint32) >> 17) + 0x1FBC).astype(mx.uint16).view(mx.bfloat16)


def _heron(v: mx.array, guess: mx.array) -> mx.array:
    """The square root of ``v``, float32, from its `_root_guess`: Heron's ``(r + v / r) / 2`` twice.

    With g++ a loop of these divisions takes a third of the time of one that must set ``errno`` for the square root of
    a negative number. Heron's step is never too small; the first by at most 0.07 %: with its mean error taken off, the
    second is right to 1.1 * 2^-24 before rounding. From 0 and denormal ``v`` the root is up to 2e-20 too large.

    >>> _heron(v := mx.array([0.0, 4.0, 1e10, float('inf')]), _root_guess(v)).tolist()
    [1.989815275238986e-20, 2.0, 100000.0, inf]
    """
    guess = guess.astype(mx.float32)
    twice = guess + mx.minimum(v, 3.4e38) / guess  # finite, so that infinity is not divided by itself
    return 0.24991056 * twice + (1.0003579 * v) / twice
