"""Checks of the arguments of `Adam` and `AdamW`."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Set
from typing import Any

import mlx.core as mx

from ..base import InputError
from ..update import LOWERINGS, POLICIES, STOCHASTIC


def check_options(
    moments: str,
    compensated: bool,
    max_grad_norm: float | None,
    skip_nonfinite: bool,
    lowering: str,
) -> None:
    """Raises ValueError if an option is out of range. The message names the option."""
    if lowering not in LOWERINGS:
        raise InputError(f"lowering is {lowering!r}; it must be one of {', '.join(map(repr, LOWERINGS))}")
    if lowering == "inplace" and moments in STOCHASTIC:
        raise InputError(f"lowering='inplace' cannot round moments stochastically; with moments={moments!r} use 'auto'")
    if moments not in POLICIES:
        raise InputError(f"moments is {moments!r}; it must be one of {', '.join(map(repr, POLICIES))}")
    for name, flag in (("compensated", compensated), ("skip_nonfinite", skip_nonfinite)):
        if not isinstance(flag, bool):
            raise InputError(f"{name} is {flag!r}; it must be True or False")
    if max_grad_norm is not None and not _is_number(max_grad_norm, 0.0, exclusive=True):
        raise InputError(f"max_grad_norm is {max_grad_norm!r}; it must be a number greater than 0, or None")


def as_scalar(name: str, value: Any, dtype: mx.Dtype) -> mx.array:
    """The number ``value``, assigned to ``state[name]``, as a 0-d array. Raises TypeError if it is no number."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()  # a NumPy scalar
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if mx.issubdtype(dtype, mx.integer):
        if number and value >= 0 and value == int(value):
            return mx.array(int(value), dtype)
    elif number:
        return mx.array(float(value), dtype)
    raise TypeError(f"state[{name!r}] is {value!r}; assign a number, or an mx.array of shape ()")


def check_numbers(betas: Any, eps: Any, bias_correction: Any) -> None:
    """Raises ValueError if an argument of MLX's own Adam is out of range. The message names the argument."""
    check_betas("betas", betas)
    check_number("eps (epsilon)", eps)
    if not isinstance(_plain(bias_correction), bool):
        raise InputError(f"bias_correction is {bias_correction!r}; it must be True or False")


def check_betas(name: str, betas: Any) -> None:
    """Raises ValueError unless ``betas`` has two numbers of at least 0 and less than 1."""
    if not hasattr(betas, "__len__") or isinstance(betas, (str, Mapping, Set)) or len(betas) != 2:
        raise InputError(f"{name} is {betas!r}; it must be two numbers")
    for i, beta in enumerate(betas):
        if not _is_number(beta, 0.0) or beta >= 1:
            raise InputError(
                f"beta{i + 1} of {name} is {beta!r}; it must be a number of at least 0 and less than 1{_hint(beta)}"
            )


def check_number(name: str, value: object) -> None:
    """Raises ValueError unless ``value`` is a finite number of at least 0."""
    if not _is_number(value, 0.0):
        raise InputError(f"{name} is {value!r}; it must be a finite number of at least 0{_hint(value)}")


def learning_rate(value: Any, name: str = "learning_rate") -> float | mx.array | Callable[[mx.array], Any]:
    """A learning rate as MLX takes it: a number of at least 0 that float32 can hold, or a function of the step.

    A 0-d array of MLX or NumPy is a number. An array that is being traced has no value yet and is not checked.

    Raises:
        ValueError: ``value`` is none of these. The message has the name and the value.

    >>> import numpy as np
    >>> learning_rate(np.float32(0.5)), learning_rate(0)
    (0.5, 0.0)
    """
    if callable(value):
        return value
    number: Any = value
    if hasattr(value, "shape") and hasattr(value, "item"):
        if value.shape != ():
            raise InputError(f"{name} is an array of shape {value.shape}; it must be one number, or a 0-d array")
        try:
            number = value.item()
        except ValueError as error:
            if not is_tracing(error):
                raise
            return value
    if isinstance(number, bool) or not isinstance(number, numbers.Real) or not 0 <= float(number) <= _LARGEST:
        raise InputError(
            f"{name} is {number!r}; it must be a finite number of at least 0, or a schedule{_hint(number)}"
        )
    return value if isinstance(value, mx.array) else float(number)


def assigned_rate(value: Any) -> mx.array:
    """A newly assigned learning rate as a 0-d float32 array. Raises ValueError like `learning_rate`."""
    if callable(value):
        raise InputError(
            f"learning_rate is {_described(value)}, a function; assign a number, or make a new optimizer with the"
            " schedule as its learning_rate"
        )
    # Always float32: an int or a float64 would change the dtype of an input and cause a new trace.
    rate: Any = learning_rate(value)
    return mx.array(rate, mx.float32)


def scheduled(name: str, schedule: Callable[[mx.array], Any], step: mx.array) -> mx.array:
    """The value of a schedule at a step, as a 0-d float32 array.

    Raises:
        ValueError: the schedule reads the value of the step (``if``, ``min``, ``math.cos``) inside a trace, where the
            step has no value yet, or it does not return one number. The message names the schedule.
    """
    try:
        value = mx.array(schedule(step), mx.float32)
    except ValueError as error:
        if not is_tracing(error):
            raise
        raise InputError(
            f"the {name} schedule {_described(schedule)} needs the value of the step in Python, as if, min, max, math,"
            " numpy, int and float do; in a compiled step it has no value. Write the schedule with mx.where,"
            " mx.minimum, mx.maximum and mx.cos, or use one of compiled_adam.schedulers"
        ) from error
    if value.ndim:
        raise InputError(
            f"the {name} schedule {_described(schedule)} returns an array of shape {value.shape}, not one number"
        )
    return value


def check_schedules(schedules: Mapping[str, Callable[[mx.array], Any]]) -> None:
    """Raises ValueError if a schedule of an optimizer cannot be a part of a compiled step. The message names it."""
    for name, schedule in schedules.items():
        mx.compile(lambda step, name=name, schedule=schedule: scheduled(name, schedule, step))(mx.array(0, mx.uint64))


def is_tracing(error: ValueError) -> bool:
    """Whether ``error`` is MLX's error for reading an array that is being traced and has no value yet."""
    return str(error).startswith("[eval] Attempting to eval an array during function transformations")


_LARGEST = 3.4028234663852886e38  # the largest finite float32


def _described(schedule: Callable[..., Any]) -> str:
    """The name of a function, with the file and line of the definition."""
    name = getattr(schedule, "__qualname__", type(schedule).__name__)
    code = getattr(schedule, "__code__", None)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code is not None else name


def _hint(value: object) -> str:
    """A hint for a number that a YAML file has in quotes."""
    if not isinstance(value, str):
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    return ", and this is text: write it without quotes"


def _is_number(value: object, least: float, exclusive: bool = False) -> bool:
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        return False
    return least <= float(number) < math.inf and not (exclusive and number == least)


def _plain(value: Any) -> Any:
    """The Python number in a 0-d array of MLX or NumPy. Any other value is returned unchanged."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
