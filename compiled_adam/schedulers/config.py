"""Schedules from a mapping with a name and arguments, such as mlx-lm's ``lr_schedule``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.optimizers as optim

from ..base import InputError
from ..optimizers import check_number
from .schedules import SCHEDULES, Described, Schedule, with_warmup

_CONFIG_KEYS = ("name", "arguments", "warmup", "warmup_init")
_MLX: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (optim.cosine_decay, optim.linear_schedule, optim.exponential_decay, optim.step_decay)
}
_FUNCTIONS = {**_MLX, **{name: function for name, function in SCHEDULES.items() if name not in _MLX}}


def from_config(config: Mapping[str, Any]) -> Schedule:
    """The schedule of an mlx-lm ``lr_schedule`` mapping: ``name``, ``arguments``, ``warmup``, ``warmup_init``.

    ``name`` is a schedule of ``mlx.optimizers`` or of this module. A schedule of ``mlx.optimizers`` starts when the
    warmup ends, at step ``warmup`` (mlx-lm starts it one step later and repeats the peak). A schedule of this module
    counts the warmup as a part of ``steps``. ``arguments`` lists the positional arguments of the function.

    >>> config = {"name": "cosine_decay", "arguments": [1.0, 100], "warmup": 10}
    >>> [round(from_config(config)(step).item(), 6) for step in (0, 5, 10, 60, 110)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if not isinstance(config, Mapping):
        raise InputError(f"lr_schedule is {config!r}; it must be a mapping with a name and arguments")
    if unknown := [key for key in config if key not in _CONFIG_KEYS]:
        raise InputError(f"lr_schedule has the key {unknown[0]!r}; the keys are {', '.join(_CONFIG_KEYS)}")
    name, arguments = config.get("name"), config.get("arguments")
    if name not in list(_FUNCTIONS):  # not the dict, because in a file the name may be a list or a mapping
        raise InputError(f"lr_schedule: name is {name!r}; it must be one of {', '.join(_FUNCTIONS)}")
    if not isinstance(arguments, Sequence) or isinstance(arguments, str) or not arguments:
        raise InputError(f"lr_schedule: arguments is {arguments!r}; it must be a list that begins with a learning rate")
    warmup = {key: config[key] for key in ("warmup", "warmup_init") if config.get(key) is not None}
    function, keywords = _FUNCTIONS[name], {} if name in _MLX else warmup
    try:
        inspect.signature(function).bind(*arguments, **keywords)
    except TypeError as error:
        raise InputError(f"lr_schedule: arguments is {arguments!r}, which does not fit {name}: {error}") from None
    try:
        if name not in _MLX:
            return function(*arguments, **keywords)
        for i, value in enumerate(arguments):
            check_number(f"arguments[{i}]", value)
        made = with_warmup(function(*arguments), arguments[0], **warmup)
        return Described(made, f"from_config({dict(config)})")
    except ValueError as error:  # MLX's own functions check some of their arguments, too
        raise InputError(f"lr_schedule: {error}") from None


def last_update(config: Mapping[str, Any]) -> int | None:
    """The update from which a schedule of `from_config` stays at its last value; None if it never ends.

    >>> cosine = {"name": "cosine_decay", "arguments": [1.0, 100], "warmup": 10}
    >>> line = {"name": "linear_schedule", "arguments": [1.0, 0.0, 100], "warmup": 10}
    >>> last_update(cosine), last_update(line), last_update({"name": "cosine", "arguments": [1.0, 100], "warmup": 10})
    (110, 110, 100)
    """
    name = config["name"]
    given = inspect.signature(_FUNCTIONS[name]).bind(*config["arguments"]).arguments
    steps = given.get("decay_steps", given.get("steps"))
    return steps + (config.get("warmup") or 0) if name in _MLX and steps is not None else steps


def check_values(schedule: Schedule, updates: int) -> None:
    """Raises ValueError if one of the first ``updates`` values is negative or not finite. The message names the update.

    It checks the last value, and at most some thousand others, evenly spread.
    """
    steps = sorted({*range(0, updates, max(1, updates // 4096)), updates - 1})
    values = mx.broadcast_to(schedule(mx.array(steps, mx.float32)), (len(steps),))
    bad = mx.logical_not((values >= 0) & mx.isfinite(values))
    if mx.any(bad).item():
        first = cast(list[bool], bad.tolist()).index(True)
        raise InputError(
            f"lr_schedule gives the learning rate {values[first].item():g} at update {steps[first]} of {updates};"
            " change its arguments so that every rate is finite and at least 0"
        )
