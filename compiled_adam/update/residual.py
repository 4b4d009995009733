"""Error compensation: the residual, two bytes per half-precision weight, stores the rounding error of the weight.

A float32 value ``x`` is stored as a weight ``w`` (``x`` rounded to nearest in the dtype of the weight) and a residual
``r`` of 16 bits. Both together give ``x`` back:

bfloat16    The bits of ``x``, as an integer, are exactly ``(bits(w) << 16) + r``. At a tie ``w`` is the neighbour
            farther from zero, so that ``r`` is an int16.
float16     ``x = w + r u(w)`` with ``u = max(|w|, 2^-14) 2^-11 / 32767``: half a unit in the last place in 32767 steps,
            which is finer than float32. Below 2^-14 the spacing of float16 is constant, and so is ``u``.

``r`` is stored as int16 for bfloat16, and as uint16 with 32768 for 0 for float16, so the two cannot be confused. Weight
and residual together follow the trajectory of a float32 master copy. A residual in bfloat16 would spend 9 of 16 bits on
sign and exponent, and lose a part of small steps.

A caller may replace a weight (a pruning mask, a clamp, new adapters) and leave the old residual. So a weight with *any*
residual gives a harmless value: within one unit in the last place of the weight, finite if the weight is finite, and
never rounded to infinity. The residual has no effect if the weight is infinite or NaN, or zero in bfloat16. In float16
a zero weight stands for values below 2^-25 of the same sign. All of these round to zero, but many small updates
together can leave zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from .kernels import unfused

Keep = Callable[[mx.array, mx.array], mx.array]  # takes a new and an old value, returns the one to keep


def new_value(new: mx.array, old: mx.array) -> mx.array:
    """The `Keep` that always updates."""
    return new


_INFINITE = 0x7F800000  # the exponent bits of an infinite or NaN float32
_ZERO = {mx.bfloat16: (0, mx.int16), mx.float16: (32768, mx.uint16)}


def applies_to(dtype: mx.Dtype) -> bool:
    """Whether weights of this dtype have a residual: bfloat16 and float16 do."""
    return dtype in _ZERO


def belongs_to(dtype: mx.Dtype, residual: mx.array) -> bool:
    """Whether ``residual`` belongs to a weight of ``dtype``."""
    return residual.dtype == _ZERO[dtype][1]


def zeros(weight: mx.array) -> mx.array:
    """A zero residual, for a ``weight`` (bfloat16 or float16) without rounding error."""
    return mx.full(weight.shape, *_ZERO[weight.dtype])


def join(weight: mx.array, residual: mx.array) -> mx.array:
    """The float32 value that ``weight`` (bfloat16 or float16) and its ``residual`` stand for."""
    if weight.dtype == mx.float16:
        return _join_float16(weight, residual)
    bits = weight.view(mx.uint16)
    magnitude, upper = bits & 0x7FFF, bits.astype(mx.uint32) << 16
    # A NaN gets the quiet bit that arithmetic would set, so that `join` and `fusable_join` give the same bits.
    otherwise = upper | (magnitude > 0x7F80).astype(mx.uint32) << 22
    return mx.where(_is_ordinary(magnitude), upper + residual.astype(mx.uint32), otherwise).view(mx.float32)


def fusable_join(weight: mx.array, residual: mx.array) -> mx.array:
    """`join` that MLX can fuse into a larger kernel. A ``view`` of integers as floats would have to go through memory.

    It computes the same bits from the spacing of float32 at the weight. Every product, quotient and sum is exact. On a
    GPU that flushes denormals the spacing of weights below 2^-102 is zero, so the value is the weight alone.
    """
    if weight.dtype == mx.float16:
        return _join_float16(weight, residual)
    rounded = weight.astype(mx.float32)
    bits, residual_bits = weight.view(mx.uint16), residual.view(mx.uint16)
    magnitude, fraction = bits & 0x7FFF, bits % 128
    at_least_one = mx.maximum(magnitude, 1)
    # The weight in units of the last place. A denormal weight has no leading 1 before the fraction. Below a power of
    # two, where the fraction is 0, the spacing is half as wide, except below the smallest normal weight, 128.
    units = mx.minimum(at_least_one, fraction + 128).astype(mx.float32)
    half = mx.minimum(at_least_one.astype(mx.float32), 256.0)
    # If a weight is not ordinary, adding the rest does not change it. MLX fuses at most eleven levels and a limited
    # number of constants. So the rest is multiplied before it is divided, and some constants occur twice.
    spacings = residual_bits.astype(mx.int16).astype(mx.float32) / 256.0 / 256.0
    rest = mx.where(_is_ordinary(magnitude), spacings * rounded, rounded)
    return rounded + rest / mx.where(fraction < (residual_bits > 0x7FFF), half, units)


def _is_ordinary(magnitude: mx.array) -> mx.array:
    """Whether bfloat16 weights, given as integers without the sign, are neither zero nor infinite nor NaN."""
    return magnitude - 1 < 0x7F7F  # unsigned: 0 - 1 is the largest integer


def _join_float16(weight: mx.array, residual: mx.array) -> mx.array:
    rounded = weight.astype(mx.float32)
    bits = weight.view(mx.uint16)
    magnitude = bits & 0x7FFF
    # The largest finite weight is 65504, 0x7BFF. `split` gives it residuals up to 16388; larger values are infinite.
    near = residual - 16380 <= 32776  # unsigned
    # A zero weight stands for values of the same sign only.
    ordinary = mx.where(magnitude < 1, (bits ^ residual) > 0x7FFF, magnitude < 0x7BFF + near.astype(mx.uint16))
    steps = mx.maximum(residual, 1).astype(mx.float32) - 32768.0
    return mx.where(ordinary, rounded + steps * _float16_unit(rounded), rounded)


def split(
    value: mx.array, weight: mx.array, residual: mx.array, keep: Keep = new_value, inplace: bool = False
) -> tuple[mx.array, mx.array]:
    """The inverse of `join`: ``value`` (float32) as a new weight of the dtype of ``weight``, and the new residual.

    A value that rounds to infinity becomes infinite. In bfloat16 a value that rounds to zero, below 2^-134, becomes
    zero. ``keep`` selects between new and old weight and residual. ``inplace``: weight and residual in two kernels.

    >>> old = mx.array([0.0], mx.bfloat16)
    >>> weight, residual = split(mx.array([1.001]), old, zeros(old))
    >>> weight, f"{join(weight, residual).item():.6f}"
    (array([1], dtype=bfloat16), '1.001000')
    """
    if weight.dtype == mx.bfloat16:
        bits = value.view(mx.uint32)
        # A NaN must not be rounded up: the NaN of all ones, which GPUs make, would overflow into -0. But a NaN with
        # ones in the lower half only must not become infinite.
        finite = (bits & _INFINITE) != _INFINITE
        rounded = mx.where(finite, bits + 0x8000, bits | ((bits & 0xFFFF) + 0xFFFF)) >> 16
        upper = keep(rounded.astype(mx.uint16), weight.view(mx.uint16))
        return upper.view(mx.bfloat16), keep(bits.astype(mx.int16), residual)
    weight = keep(value.astype(weight.dtype), weight)
    if inplace:
        weight = unfused(weight)
    rounded = weight.astype(mx.float32)
    # Adding a half makes the cast round to nearest. A call of `round` would be one level too many to fuse.
    steps = (value - rounded) / _float16_unit(rounded) + 32768.5
    steps = mx.where(mx.abs(rounded) < math.inf, steps, 32768.0)  # else the steps are NaN, which has no integer
    return weight, keep(steps.astype(residual.dtype), residual)


def of_replaced(residual: mx.array, before: mx.array, weight: mx.array) -> mx.array:
    """The residual after a caller has replaced the weight ``before`` by ``weight``: zero where the two differ.

    >>> before, weight = mx.array([1.0, 2.0], mx.bfloat16), mx.array([1.0, 0.0], mx.bfloat16)
    >>> of_replaced(mx.array([5, 5], mx.int16), before, weight)
    array([5, 0], dtype=int16)
    """
    if (weight.size, weight.dtype) != (before.size, before.dtype) or not belongs_to(weight.dtype, residual):
        return residual  # the update will raise an error for this weight
    same = weight.view(mx.uint16).reshape(residual.shape) == before.view(mx.uint16).reshape(residual.shape)
    return mx.where(same, residual, mx.array(*_ZERO[weight.dtype]))


def _float16_unit(x: mx.array) -> mx.array:
    return mx.maximum(mx.abs(x), 2.0**-14) * (2.0**-11 / 32767)
