"""Schedules by their names, as mlx-lm's ``lr_schedule`` gives them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from ..base import InputError
from ..optimizers import check_number
from .schedules import (
    Schedule,
    constant,
    cosine,
    exponential,
    inverse_sqrt,
    linear,
    one_cycle,
    polynomial,
    warmup_stable_decay,
    with_warmup,
)

_CONFIG_KEYS = ("name", "arguments", "warmup", "warmup_init")
_MLX: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (optim.cosine_decay, optim.linear_schedule, optim.exponential_decay, optim.step_decay)
}
_OURS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        constant,
        linear,
        cosine,
        polynomial,
        warmup_stable_decay,
        inverse_sqrt,
        exponential,
        one_cycle,
    )
}


def from_config(config: Mapping[str, Any]) -> Schedule:
    """The schedule of an mlx-lm ``lr_schedule`` mapping: ``name``, ``arguments``, ``warmup``, ``warmup_init``.

    ``name`` is that of an ``mlx.optimizers`` schedule, which then starts where the warmup ends, as in mlx-lm (but at
    step ``warmup``; mlx-lm starts it one later and has the peak twice); or it is one of this module, whose
    horizon includes the warmup. ``arguments`` is a list in the order of that function's parameters.

    >>> config = {"name": "cosine_decay", "arguments": [1.0, 100], "warmup": 10}
    >>> [round(from_config(config)(step).item(), 6) for step in (0, 5, 10, 60, 110)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if not isinstance(config, Mapping):
        raise InputError(f"lr_schedule is {config!r}; it must be a mapping with a name and arguments")
    if unknown := [key for key in config if key not in _CONFIG_KEYS]:
        raise InputError(f"lr_schedule has the key {unknown[0]!r}; the keys are {', '.join(_CONFIG_KEYS)}")
    name, arguments = config.get("name"), config.get("arguments")
    if name not in (*_MLX, *_OURS):
        raise InputError(f"lr_schedule: name is {name!r}; it must be one of {', '.join((*_MLX, *_OURS))}")
    if not isinstance(arguments, Sequence) or isinstance(arguments, str) or not arguments:
        raise InputError(f"lr_schedule: arguments is {arguments!r}; it must be a list that begins with a learning rate")
    warmup = {key: config[key] for key in ("warmup", "warmup_init") if config.get(key) is not None}
    function, keywords = (_MLX[name], {}) if name in _MLX else (_OURS[name], warmup)
    try:
        inspect.signature(function).bind(*arguments, **keywords)
    except TypeError as error:
        raise InputError(f"lr_schedule: arguments is {arguments!r}, which does not fit {name}: {error}") from None
    try:
        if name in _OURS:
            return function(*arguments, **keywords)
        for i, value in enumerate(arguments):
            check_number(f"arguments[{i}]", value)
        return with_warmup(function(*arguments), arguments[0], **warmup)
    except ValueError as error:  # MLX's own functions check some of their arguments, too
        raise InputError(f"lr_schedule: {error}") from None


def check_values(schedule: Schedule, updates: int) -> None:
    """Raises ValueError, naming the update, if one of the first ``updates`` values is no learning rate.

    At most some thousand of them are looked at, evenly spread, and the last one.
    """
    steps = sorted({*range(0, updates, max(1, updates // 4096)), updates - 1})
    values = mx.broadcast_to(schedule(mx.array(steps, mx.float32)), (len(steps),))
    bad = mx.logical_not((values >= 0) & mx.isfinite(values))
    if mx.any(bad).item():
        first = bad.tolist().index(True)  # type: ignore[union-attr]
        raise InputError(
            f"lr_schedule gives the learning rate {values[first].item():g} at update {steps[first]} of {updates};"
            " change its arguments so that every rate is finite and at least 0"
        )
