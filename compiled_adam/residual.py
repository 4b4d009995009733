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
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from . import rule

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
    upper = weight.view(mx.uint16).astype(mx.uint32) << 16
    return (upper + residual.astype(mx.uint32)).view(mx.float32)


def fusable_join(weight: mx.array, residual: mx.array) -> mx.array:
    """`join` for a kernel that goes on with the value: integers are seen as a float only once they are in memory.

    It computes the same with the spacing of float32 at the weight, except for weights below 2^-102, whose spacing a
    GPU flushes to zero.
    """
    if weight.dtype == mx.float16:
        return _join_float16(weight, residual)
    rounded = weight.astype(mx.float32)
    fraction = weight.view(mx.uint16) & 0x7F
    # The weight's mantissa as an integer. Below a power of two, where the fraction is 0, the spacing is half as wide.
    mantissa = mx.where(fraction < (residual < 0), 256.0, (fraction + 128).astype(mx.float32))
    spacings = residual.astype(mx.float32) * 2.0**-16
    # Selected, since an infinite weight (a mask, say) has an infinite spacing, and 0 * inf is not a number.
    return mx.where(residual == 0, rounded, rounded + spacings * (rounded / mantissa))


def _join_float16(weight: mx.array, residual: mx.array) -> mx.array:
    rounded = weight.astype(mx.float32)
    return rounded + (residual.astype(mx.float32) - 32768.0) * _float16_unit(rounded)


def split(
    value: mx.array, weight: mx.array, residual: mx.array, keep: Keep = new_value, inplace: bool = False
) -> tuple[mx.array, mx.array]:
    """``value`` (float32) as a new weight of the dtype of ``weight``, and its residual: the inverse of `join`.

    ``keep`` selects between each of them and the old one; ``inplace``: each in a kernel of its own.

    >>> old = mx.array([0.0], mx.bfloat16)
    >>> weight, residual = split(mx.array([1.001]), old, zeros(old))
    >>> weight, f"{join(weight, residual).item():.6f}"
    (array([1], dtype=bfloat16), '1.001000')
    """
    if weight.dtype == mx.bfloat16:
        bits = value.view(mx.uint32)
        # What is not finite must not be rounded up: a NaN of all ones, which GPUs make, would overflow into -0.
        finite = (bits & _INFINITE) != _INFINITE
        upper = keep((mx.where(finite, bits + 0x8000, bits) >> 16).astype(mx.uint16), weight.view(mx.uint16))
        return upper.view(mx.bfloat16), keep(bits.astype(mx.int16), residual)
    weight = keep(value.astype(weight.dtype), weight)
    if inplace:
        weight = rule.unfused(weight)
    rounded = weight.astype(mx.float32)
    # The half makes the cast round to nearest; a rounding of its own would be one level too many to fuse.
    steps = (value - rounded) / _float16_unit(rounded) + 32768.5
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
    return mx.clip(mx.abs(x), 2.0**-14, 65504.0) * (2.0**-11 / 32767)
