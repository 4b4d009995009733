"""Error compensation: what a half-precision weight loses to rounding, kept in two bytes beside it.

A float32 value ``x`` is stored as a weight ``w``, which is ``x`` rounded to the weight's dtype, and an int16 ``r`` such
that ``x = w + r u(w)``, where the unit ``u`` is chosen so that 16 bits span the gap that rounding leaves:

bfloat16    ``u`` is the spacing of float32 at ``w``, 2^(e - 23) for ``|w|`` in [2^e, 2^(e+1)): 8 bits of mantissa in
            ``w`` and 16 in ``r`` are the 24 of float32, and ``x`` comes back bit by bit. (Below a power of two float32
            is twice as fine; there the last bit is lost.)
float16     ``u = max(|w|, 2^-14) 2^-11 / 32767``, half a unit in the last place in 32767 steps, which is finer than
            float32. Below 2^-14 the spacing of float16 is constant, and so is ``u``.

So weight and residual follow the trajectory of a float32 master copy. A residual in bfloat16 would spend 9 of its 16
bits on sign and exponent, and keep 81 % of the movement at a learning rate of 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

Keep = Callable[[mx.array, mx.array], mx.array]  # of a new and an old value, the one that holds


def new_value(new: mx.array, old: mx.array) -> mx.array:
    """The `Keep` that always updates."""
    return new


def applies_to(dtype: mx.Dtype) -> bool:
    """Whether weights of this dtype lose anything: bfloat16 and float16 do."""
    return dtype in (mx.bfloat16, mx.float16)


def zeros(shape: tuple[int, ...]) -> mx.array:
    """The residual of weights that are exact: int16 of their shape."""
    return mx.zeros(shape, mx.int16)


def join(weight: mx.array, residual: mx.array) -> mx.array:
    """The float32 value that ``weight`` (bfloat16 or float16) and ``residual`` (int16) stand for."""
    rounded = weight.astype(mx.float32)
    if weight.dtype == mx.float16:
        unit = _float16_unit(rounded)
    else:
        fraction = (weight.view(mx.uint16) & 0x7F).astype(mx.float32)
        unit = _bfloat16_unit(rounded, fraction * 2.0**16)
    return rounded + residual.astype(mx.float32) * unit


def split(value: mx.array, weight: mx.array, residual: mx.array, keep: Keep = new_value) -> tuple[mx.array, mx.array]:
    """``value`` (float32) as a new weight of the dtype of ``weight``, and its residual: the inverse of `join`.

    ``keep`` selects between each of them and the old one.

    >>> weight, residual = split(mx.array([1.001]), mx.array([0.0], mx.bfloat16), zeros((1,)))
    >>> weight, f"{join(weight, residual).item():.6f}"
    (array([1], dtype=bfloat16), '1.001000')
    """
    weight = keep(value.astype(weight.dtype), weight)
    rounded = weight.astype(mx.float32)
    if weight.dtype == mx.float16:
        steps = (value - rounded) / _float16_unit(rounded)
    else:
        fraction = value.view(mx.uint32) & 0x7FFFFF
        steps = (value - rounded) / _bfloat16_unit(value, fraction.astype(mx.float32))
        # Rounded up to a power of two: the unit of the weight is twice that of the value.
        steps = steps * mx.where(fraction >= 0x7F8000, 0.5, 1.0)
    # At a tie the difference is 32768 steps, which an int16 has on the negative side only.
    return weight, keep(mx.minimum(mx.round(steps), 32767.0).astype(mx.int16), residual)


def _bfloat16_unit(x: mx.array, fraction: mx.array) -> mx.array:
    """2^(e - 23) for ``|x|`` in [2^e, 2^(e+1)), whose mantissa is ``1 + fraction 2^-23``.

    A quotient, because the pattern of the exponent could not become a float within a kernel: a view is free, but only
    of an array that exists. Below 2^-102 the unit no longer shrinks; GPUs would flush it to zero, and divide by it.
    """
    return mx.maximum(mx.abs(x), 2.0**-102) / (fraction + 2.0**23)


def _float16_unit(x: mx.array) -> mx.array:
    return mx.maximum(mx.abs(x), 2.0**-14) * (2.0**-11 / 32767)
