"""How the update of a leaf becomes kernels: all in one, or each array in one that overwrites it.

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
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

LOWERINGS = ("auto", "fused", "inplace")
LARGE = 1 << 15
SLOW_SQRT = sys.platform == "linux"

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
