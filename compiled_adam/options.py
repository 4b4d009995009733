"""What the keyword options of `Adam` may be."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from .errors import InputError
from .lowering import LOWERINGS
from .moments import POLICIES, STOCHASTIC


def check_options(
    moments: str,
    compensated: bool,
    max_grad_norm: float | None,
    skip_nonfinite: bool,
    multipliers: Mapping[str, float] | None,
    lowering: str,
) -> None:
    """Raises ValueError for an option that is out of its range, naming it."""
    if lowering not in LOWERINGS:
        raise InputError(f"lowering is {lowering!r}; it must be one of {', '.join(map(repr, LOWERINGS))}")
    if lowering == "inplace" and moments in STOCHASTIC:
        raise InputError(
            f"lowering='inplace' needs moments that are stored as computed; with moments={moments!r} use 'auto'"
        )
    if moments not in POLICIES:
        raise InputError(f"moments is {moments!r}; it must be one of {', '.join(map(repr, POLICIES))}")
    for name, flag in (("compensated", compensated), ("skip_nonfinite", skip_nonfinite)):
        if not isinstance(flag, bool):
            raise InputError(f"{name} is {flag!r}; it must be True or False")
    if max_grad_norm is not None and not _is_number(max_grad_norm, 0.0, exclusive=True):
        raise InputError(f"max_grad_norm is {max_grad_norm!r}; it must be a number greater than 0, or None")
    if multipliers is not None and not isinstance(multipliers, Mapping):
        raise InputError(f"learning_rate_multipliers is {multipliers!r}; it must be a mapping of patterns to factors")
    for pattern, factor in (multipliers or {}).items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise InputError(f"learning_rate_multipliers has the pattern {pattern!r}: {error}") from None
        if not _is_number(factor, 0.0):
            raise InputError(f"learning_rate_multipliers[{pattern!r}] is {factor!r}; it must be a number of at least 0")


def as_scalar(name: str, value: Any, dtype: mx.Dtype) -> mx.array:
    """A 0-d array of a number that is assigned to ``state[name]``. Raises TypeError if it is none."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()  # of NumPy
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if mx.issubdtype(dtype, mx.integer):
        if number and value >= 0 and value == int(value):
            return mx.array(int(value), dtype)
    elif number:
        return mx.array(float(value), dtype)
    raise TypeError(f"state[{name!r}] is {value!r}; assign a number, or an mx.array of shape ()")


def _is_number(value: object, least: float, exclusive: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return least <= value < math.inf and not (exclusive and value == least)
