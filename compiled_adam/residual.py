"""Error compensation: what a half-precision weight loses to rounding, kept in two bytes beside it.

A float32 value ``x`` is stored as a weight ``w``, which is ``x`` rounded to the weight's dtype, and 16 bits ``r`` such
that ``x = w + r u(w)``, where the unit ``u`` is chosen so that 16 bits span the gap that rounding leaves:

bfloat16    ``u`` is the spacing of float32 at ``w``, 2^(e - 23) for ``|w|`` in [2^e, 2^(e+1)): 8 bits of mantissa in
            ``w`` and 16 in ``r`` are the 24 of float32, and ``x`` comes back bit by bit. (Below a power of two float32
            is twice as fine; there the last bit is lost.)
float16     ``u = max(|w|, 2^-14) 2^-11 / 32767``, half a unit in the last place in 32767 steps, which is finer than
            float32. Below 2^-14 the spacing of float16 is constant, and so is ``u``.

``r`` is stored as int16 for bfloat16, and for float16 as uint16 with 32768 for 0, so that neither is ever taken for
the other. Weight and residual follow the trajectory of a float32 master copy. A residual in bfloat16 would spend 9 of
its 16 bits on sign and exponent, and keep 81 % of the movement at a learning rate of 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

Keep = Callable[[mx.array, mx.array], mx.array]  # of a new and an old value, the one that holds


def new_value(new: mx.array, old: mx.array) -> mx.array:
    """The `Keep` that always updates."""
    return new


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
    rounded, steps = weight.astype(mx.float32), residual.astype(mx.float32)
    if weight.dtype == mx.float16:
        return rounded + (steps - 32768.0) * _float16_unit(rounded)
    fraction = (weight.view(mx.uint16) & 0x7F).astype(mx.float32)
    return rounded + steps * _bfloat16_unit(rounded, fraction * 2.0**16)


def split(value: mx.array, weight: mx.array, residual: mx.array, keep: Keep = new_value) -> tuple[mx.array, mx.array]:
    """``value`` (float32) as a new weight of the dtype of ``weight``, and its residual: the inverse of `join`.

    ``keep`` selects between each of them and the old one.

    >>> old = mx.array([0.0], mx.bfloat16)
    >>> weight, residual = split(mx.array([1.001]), old, zeros(old))
    >>> weight, f"{join(weight, residual).item():.6f}"
    (array([1], dtype=bfloat16), '1.001000')
    """
    weight = keep(value.astype(weight.dtype), weight)
    rounded = weight.astype(mx.float32)
    if weight.dtype == mx.float16:
        # The half makes the cast round to nearest; a rounding of its own would be one level too many to fuse.
        steps = (value - rounded) / _float16_unit(rounded) + 32768.5
    else:
        fraction = value.view(mx.uint32) & 0x7FFFFF
        steps = (value - rounded) / _bfloat16_unit(value, fraction.astype(mx.float32))
        # Rounded up to a power of two: the unit of the weight is twice that of the value. At a tie the difference is
        # 32768 steps, which an int16 has on the negative side only.
        steps = mx.minimum(mx.round(steps * mx.where(fraction >= 0x7F8000, 0.5, 1.0)), 32767.0)
    return weight, keep(steps.astype(residual.dtype), residual)


def _bfloat16_unit(x: mx.array, fraction: mx.array) -> mx.array:
    """2^(e - 23) for ``|x|`` in [2^e, 2^(e+1)), whose mantissa is ``1 + fraction 2^-23``.

    A quotient, because the pattern of the exponent could not become a float within a kernel: a view is free, but only
    of an array that exists. Below 2^-102 the unit no longer shrinks; GPUs would flush it to zero, and divide by it.
    Of an infinite weight (a mask, say) it is finite, since 0 * inf is not a number.
    """
    return mx.clip(mx.abs(x), 2.0**-102, 2.0**127) / (fraction + 2.0**23)


def _float16_unit(x: mx.array) -> mx.array:
    return mx.clip(mx.abs(x), 2.0**-14, 65504.0) * (2.0**-11 / 32767)
