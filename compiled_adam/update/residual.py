"""Error compensation: what a half-precision weight loses to rounding, kept in two bytes beside it.

A float32 value ``x`` is stored as a weight ``w``, which is ``x`` rounded to the nearest of the weight's dtype, and 16
bits ``r``, from which ``x`` comes back:

bfloat16    The bits of ``x``, as an integer, are ``(bits(w) << 16) + r``: bit by bit. At a tie ``w`` is the neighbour
            farther from zero, so that ``r`` is an int16.
float16     ``x = w + r u(w)`` with ``u = max(|w|, 2^-14) 2^-11 / 32767``, half a unit in the last place in 32767 steps,
            which is finer than float32. Below 2^-14 the spacing of float16 is constant, and so is ``u``.

``r`` is stored as int16 for bfloat16, and for float16 as uint16 with 32768 for 0, so that neither is ever taken for
the other. Weight and residual follow the trajectory of a float32 master copy. A residual in bfloat16 would spend 9 of
its 16 bits on sign and exponent, and keep 81 % of the movement at a learning rate of 1e-5.

Somebody may replace a weight (a pruning mask, a clamp, adapters begun anew) and leave the residual of the old one. So
a weight and *any* residual make a value that is harmless: within one unit in the last place of the weight, finite if
the weight is, and rounded to no infinity. Infinite weights, those that are not a number and, in bfloat16, zeros of both
signs are the value, whatever the residual. In float16 a zero weight stands for values below 2^-25, of its sign: all of
them round to that zero, and many small updates together leave it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from .kernels import unfused

Keep = Callable[[mx.array, mx.array], mx.array]  # of a new and an old value, the one that holds


def new_value(new: mx.array, old: mx.array) -> mx.array:
    """The `Keep` that always updates."""
    return new


_INFINITE = 0x7F800000  # the exponent of what is infinite or not a number, as float32
_ZERO = {mx.bfloat16: (0, mx.int16), mx.float16: (32768, mx.uint16)}


def applies_to(dtype: mx.Dtype) -> bool:
    """Whether weights of this dtype lose anything: bfloat16 and float16 do."""
    return dtype in _ZERO


def belongs_to(dtype: mx.Dtype, residual: mx.array) -> bool:
    """Whether ``residual`` is of a weight of ``dtype``."""
    return residual.dtype == _ZERO[dtype][1]


def zeros(weight: mx.array) -> mx.array:
    """The residual of a weight (bfloat16 or float16) that is exact."""
    return mx.full(weight.shape, *_ZERO[weight.dtype])


def join(weight: mx.array, residual: mx.array) -> mx.array:
    """The float32 value that ``weight`` (bfloat16 or float16) and its ``residual`` stand for."""
    if weight.dtype == mx.float16:
        return _join_float16(weight, residual)
    bits = weight.view(mx.uint16)
    magnitude, upper = bits & 0x7FFF, bits.astype(mx.uint32) << 16
    # One that is not a number gets the bit that arithmetic gives it, so that both joins have the same bits.
    otherwise = upper | (magnitude > 0x7F80).astype(mx.uint32) << 22
    return mx.where(_is_ordinary(magnitude), upper + residual.astype(mx.uint32), otherwise).view(mx.float32)


def fusable_join(weight: mx.array, residual: mx.array) -> mx.array:
    """`join` for a kernel that goes on with the value: integers are seen as a float only once they are in memory.

    It computes the same bits with the spacing of float32 at the weight: every product, quotient and sum is exact. A GPU
    that flushes denormals takes the spacing of weights below 2^-102 for zero, and so the weight for the value.
    """
    if weight.dtype == mx.float16:
        return _join_float16(weight, residual)
    rounded = weight.astype(mx.float32)
    bits, residual_bits = weight.view(mx.uint16), residual.view(mx.uint16)
    magnitude, fraction = bits & 0x7FFF, bits % 128
    at_least_one = mx.maximum(magnitude, 1)
    # The weight in units of its last place: a denormal one has no leading 1 before its fraction. Below a power of two,
    # where the fraction is 0, the spacing is half as wide, except below the least that is no denormal, 128.
    units = mx.minimum(at_least_one, fraction + 128).astype(mx.float32)
    half = mx.minimum(at_least_one.astype(mx.float32), 256.0)
    # What is not ordinary has a rest that, added to it, gives itself. MLX fuses at most eleven levels and a number of
    # constants: the rest is multiplied before it is divided, and some constants occur twice.
    spacings = residual_bits.astype(mx.int16).astype(mx.float32) / 256.0 / 256.0
    rest = mx.where(_is_ordinary(magnitude), spacings * rounded, rounded)
    return rounded + rest / mx.where(fraction < (residual_bits > 0x7FFF), half, units)


def _is_ordinary(magnitude: mx.array) -> mx.array:
    """Whether bfloat16 weights, as integers without the sign, are neither zero nor infinite nor not a number."""
    return magnitude - 1 < 0x7F7F  # unsigned: from zero it is the largest


def _join_float16(weight: mx.array, residual: mx.array) -> mx.array:
    rounded = weight.astype(mx.float32)
    bits = weight.view(mx.uint16)
    magnitude = bits & 0x7FFF
    # The largest, 65504 or 0x7BFF, is that of `split` with residuals up to 16388; further values are infinite.
    near = residual - 16380 <= 32776  # unsigned
    # A zero takes values of its own sign only.
    ordinary = mx.where(magnitude < 1, (bits ^ residual) > 0x7FFF, magnitude < 0x7BFF + near.astype(mx.uint16))
    steps = mx.maximum(residual, 1).astype(mx.float32) - 32768.0
    return mx.where(ordinary, rounded + steps * _float16_unit(rounded), rounded)


def split(
    value: mx.array, weight: mx.array, residual: mx.array, keep: Keep = new_value, inplace: bool = False
) -> tuple[mx.array, mx.array]:
    """``value`` (float32) as a new weight of the dtype of ``weight``, and its residual: the inverse of `join`.

    What rounds to infinity stays infinite, and in bfloat16 what rounds to zero, below 2^-134, stays zero. ``keep``
    selects between each of them and the old one; ``inplace``: each in a kernel of its own.

    >>> old = mx.array([0.0], mx.bfloat16)
    >>> weight, residual = split(mx.array([1.001]), old, zeros(old))
    >>> weight, f"{join(weight, residual).item():.6f}"
    (array([1], dtype=bfloat16), '1.001000')
    """
    if weight.dtype == mx.bfloat16:
        bits = value.view(mx.uint32)
        # What is not finite must not be rounded up: a NaN of all ones, which GPUs make, would overflow into -0. But a
        # NaN whose ones are all in the lower half must not become infinite.
        finite = (bits & _INFINITE) != _INFINITE
        rounded = mx.where(finite, bits + 0x8000, bits | ((bits & 0xFFFF) + 0xFFFF)) >> 16
        upper = keep(rounded.astype(mx.uint16), weight.view(mx.uint16))
        return upper.view(mx.bfloat16), keep(bits.astype(mx.int16), residual)
    weight = keep(value.astype(weight.dtype), weight)
    if inplace:
        weight = unfused(weight)
    rounded = weight.astype(mx.float32)
    # The half makes the cast round to nearest; a rounding of its own would be one level too many to fuse.
    steps = (value - rounded) / _float16_unit(rounded) + 32768.5
    steps = mx.where(mx.abs(rounded) < math.inf, steps, 32768.0)  # else not a number, which has no integer
    return weight, keep(steps.astype(residual.dtype), residual)


def of_replaced(residual: mx.array, before: mx.array, weight: mx.array) -> mx.array:
    """The residual of a ``weight`` that somebody has put in the place of the one ``before``: zero where they differ.

    >>> before, weight = mx.array([1.0, 2.0], mx.bfloat16), mx.array([1.0, 0.0], mx.bfloat16)
    >>> of_replaced(mx.array([5, 5], mx.int16), before, weight)
    array([5, 0], dtype=int16)
    """
    if (weight.size, weight.dtype) != (before.size, before.dtype) or not belongs_to(weight.dtype, residual):
        return residual  # an error that the update raises
    same = weight.view(mx.uint16).reshape(residual.shape) == before.view(mx.uint16).reshape(residual.shape)
    return mx.where(same, residual, mx.array(*_ZERO[weight.dtype]))


def _float16_unit(x: mx.array) -> mx.array:
    return mx.maximum(mx.abs(x), 2.0**-14) * (2.0**-11 / 32767)
