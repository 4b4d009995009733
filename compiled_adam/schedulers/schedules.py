"""Learning rates as functions of the step, for any MLX optimizer: ``AdamW(schedulers.cosine(1e-3, 1000, warmup=50))``.

A schedule maps the step to the learning rate, a 0-d float32 array. The step is the number of updates made so far: 0 at
the first update; a 0-d array of any dtype, or a number. A schedule is a pure function of arrays, so a compiled step can
contain it. Most schedules have these arguments:

- ``steps``: the length of the schedule in updates, including the warmup. From step ``steps`` on the value is ``end``.
- ``warmup``: the number of updates in which the rate rises linearly from ``warmup_init`` (at step 0) to exactly
  ``peak`` (at step ``warmup``). The decay starts at ``peak``: no step is repeated or left out. Default 0: no warmup.

Bad arguments raise ValueError with the name and the value of the argument.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import ParamSpec

import mlx.core as mx

from ..base import InputError, shown
from ..optimizers import check_number

Step = int | float | mx.array
Schedule = Callable[[Step], mx.array]
P = ParamSpec("P")


class Described:
    """A schedule with a text as its representation."""

    def __init__(self, schedule: Schedule, text: str) -> None:
        self._schedule, self._text = schedule, text
        self.__qualname__ = text  # for messages about schedules

    def __call__(self, step: Step) -> mx.array:
        return self._schedule(step)

    def __repr__(self) -> str:
        return self._text


def described(function: Callable[P, Schedule]) -> Callable[P, Schedule]:
    """Lets the schedules that ``function`` returns show the call that made them."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Schedule:
        given = [*map(shown, args), *(f"{name}={shown(value)}" for name, value in kwargs.items())]
        return Described(function(*args, **kwargs), f"{function.__name__}({', '.join(given)})")

    return call


@described
def constant(value: float, *, warmup: int = 0, warmup_init: float = 0.0) -> Schedule:
    """``value`` at every step from ``warmup`` on.

    >>> round(constant(0.5)(7).item(), 6)
    0.5
    """
    check_number("value", value)
    return with_warmup(lambda step: mx.array(value, mx.float32), value, warmup, warmup_init)


@described
def linear(peak: float, steps: int, end: float = 0.0, *, warmup: int = 0, warmup_init: float = 0.0) -> Schedule:
    """A straight line from ``peak`` at step ``warmup`` to ``end`` at ``steps``.

    >>> [round(linear(1.0, 10, warmup=2)(step).item(), 6) for step in (0, 1, 2, 6, 10, 99)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    return polynomial(peak, steps, end, 1.0, warmup=warmup, warmup_init=warmup_init)


@described
def cosine(peak: float, steps: int, end: float = 0.0, *, warmup: int = 0, warmup_init: float = 0.0) -> Schedule:
    """``end + (peak - end) (1 + cos(pi t)) / 2``, half a cosine: ``t`` is 0 at step ``warmup`` and 1 at ``steps``.

    Source: Loshchilov and Hutter, "SGDR", ICLR 2017, without restarts.

    >>> [round(cosine(1.0, 10, 0.1, warmup=2)(step).item(), 6) for step in (0, 2, 6, 10, 99)]
    [0.0, 1.0, 0.55, 0.1, 0.1]
    """
    length = _decay_length(peak, steps, end, warmup)
    return with_warmup(lambda step: _mix(peak, end, _half_cosine(step / length)), peak, warmup, warmup_init)


@described
def polynomial(
    peak: float, steps: int, end: float = 0.0, power: float = 2.0, *, warmup: int = 0, warmup_init: float = 0.0
) -> Schedule:
    """``end + (peak - end) (1 - t)^power``, where ``t`` goes from 0 at step ``warmup`` to 1 at ``steps``.

    >>> [round(polynomial(1.0, 10, power=2.0)(step).item(), 6) for step in (0, 5, 10)]
    [1.0, 0.25, 0.0]
    """
    length = _decay_length(peak, steps, end, warmup)
    _positive("power", power)

    def decay(step: mx.array) -> mx.array:
        remaining = 1 - mx.minimum(step / length, 1)
        return _mix(end, peak, remaining if power == 1 else remaining**power)

    return with_warmup(decay, peak, warmup, warmup_init)


@described
def warmup_stable_decay(
    peak: float, steps: int, end: float = 0.0, decay: int | None = None, *, warmup: int = 0, warmup_init: float = 0.0
) -> Schedule:
    """``peak`` until step ``steps - decay``, then a straight line to ``end``. Default ``decay``: a fifth of ``steps``.

    Source: Hu et al., "MiniCPM", 2024 (arXiv 2404.06395).

    >>> schedule = warmup_stable_decay(1.0, 100, decay=20, warmup=10)
    >>> [round(schedule(step).item(), 6) for step in (0, 5, 10, 80, 90, 100)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    """
    length = _decay_length(peak, steps, end, warmup)
    decay = max(1, steps // 5) if decay is None else decay
    check_count("decay", decay, 1)
    if decay > length:
        raise InputError(f"decay is {decay}; it must be at most steps - warmup = {length}")

    def stable_decay(step: mx.array) -> mx.array:
        return _mix(peak, end, mx.clip((step - (length - decay)) / decay, 0, 1))

    return with_warmup(stable_decay, peak, warmup, warmup_init)


@described
def inverse_sqrt(peak: float, timescale: int | None = None, *, warmup: int = 0, warmup_init: float = 0.0) -> Schedule:
    """``peak / sqrt(1 + (step - warmup) / timescale)``. By default ``timescale`` is ``warmup``, which gives
    ``peak sqrt(warmup / step)``.
    Source: Vaswani et al., "Attention is all you need", 2017, section 5.3.

    >>> [round(inverse_sqrt(1.0, warmup=100)(step).item(), 6) for step in (50, 100, 400)]
    [0.5, 1.0, 0.5]
    """
    check_number("peak", peak)
    check_count("warmup", warmup, 0)
    if timescale is None:
        if warmup == 0:
            raise InputError("timescale is None and warmup is 0; give one of them to set how fast the value falls")
        timescale = warmup
    check_count("timescale", timescale, 1)
    return with_warmup(lambda step: peak / mx.sqrt(1 + step / timescale), peak, warmup, warmup_init)


@described
def exponential(
    peak: float, decay_rate: float, end: float = 0.0, *, warmup: int = 0, warmup_init: float = 0.0
) -> Schedule:
    """``max(peak decay_rate^(step - warmup), end)``, with ``decay_rate`` in (0, 1].

    >>> [round(exponential(1.0, 0.5, 0.2)(step).item(), 6) for step in (0, 1, 2, 3)]
    [1.0, 0.5, 0.25, 0.2]
    """
    log_rate = _log_rate(peak, decay_rate, end)
    return with_warmup(lambda step: mx.maximum(peak * mx.exp(log_rate * step), end), peak, warmup, warmup_init)


@described
def step_decay(
    peak: float, decay_rate: float, step_size: int, end: float = 0.0, *, warmup: int = 0, warmup_init: float = 0.0
) -> Schedule:
    """``max(peak decay_rate^floor((step - warmup) / step_size), end)``, with ``decay_rate`` in (0, 1].

    >>> [round(step_decay(1.0, 0.1, 10)(step).item(), 6) for step in (0, 9, 10, 20)]
    [1.0, 1.0, 0.1, 0.01]
    """
    log_rate = _log_rate(peak, decay_rate, end)
    check_count("step_size", step_size, 1)

    def decay(step: mx.array) -> mx.array:
        # Half a step is added, so that a quotient that a GPU rounds down cannot miss a boundary.
        return mx.maximum(peak * mx.exp(log_rate * mx.floor((step + 0.5) / step_size)), end)

    return with_warmup(decay, peak, warmup, warmup_init)


@described
def one_cycle(
    peak: float, steps: int, end: float | None = None, *, warmup: int | None = None, warmup_init: float | None = None
) -> Schedule:
    """Half a cosine up from ``warmup_init`` to ``peak`` at ``warmup``, and half a cosine down to ``end`` at ``steps``.

    Defaults: ``warmup`` is 30 % of ``steps``, ``warmup_init`` is ``peak / 25``, ``end`` is ``warmup_init / 10_000``.
    Source: Smith and Topin, "Super-convergence", 2017 (arXiv 1708.07120), in the two-phase form of PyTorch.

    >>> [round(one_cycle(1.0, 100)(step).item(), 6) for step in (0, 15, 30, 65, 100)]
    [0.04, 0.52, 1.0, 0.500002, 4e-06]
    """
    check_number("peak", peak)
    check_count("steps", steps, 1)
    warmup = round(0.3 * steps) if warmup is None else warmup
    warmup_init = peak / 25 if warmup_init is None else warmup_init
    end = warmup_init / 10_000 if end is None else end
    length = _decay_length(peak, steps, end, warmup)
    return with_warmup(
        lambda step: _mix(peak, end, _half_cosine(step / length)), peak, warmup, warmup_init, ramp=_half_cosine
    )


@described
def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """Several schedules in a row: ``schedules[i]`` begins, with step 0, at step ``boundaries[i - 1]``.

    >>> schedule = join([constant(1.0), linear(0.5, 10)], [100])
    >>> [round(schedule(step).item(), 6) for step in (99, 100, 105)]
    [1.0, 0.5, 0.25]
    """
    if not schedules or not all(callable(schedule) for schedule in schedules):
        raise InputError(f"schedules is {schedules!r}; it must be a list of at least one schedule")
    if len(boundaries) != len(schedules) - 1:
        raise InputError(f"boundaries is {boundaries!r}; {len(schedules)} schedules need {len(schedules) - 1}")
    for i, boundary in enumerate(boundaries):
        check_count(f"boundaries[{i}]", boundary, 1 if i == 0 else boundaries[i - 1] + 1)

    def schedule(step: Step) -> mx.array:
        step = mx.array(step, mx.float32)
        value = schedules[0](step)
        for boundary, following in zip(boundaries, schedules[1:], strict=True):
            value = mx.where(step < boundary, value, following(mx.maximum(step - boundary, 0)))
        return value

    return schedule


def with_warmup(
    decay: Callable[[mx.array], mx.array],
    peak: float,
    warmup: int = 0,
    warmup_init: float = 0.0,
    ramp: Callable[[mx.array], mx.array] = lambda t: t,
) -> Schedule:
    """``warmup_init`` to ``peak`` along ``ramp`` over ``warmup`` steps, then ``decay(step - warmup)``."""
    check_count("warmup", warmup, 0)
    check_number("warmup_init", warmup_init)

    def schedule(step: Step) -> mx.array:
        step = mx.array(step, mx.float32)
        value = decay(mx.maximum(step - warmup, 0))
        if warmup == 0:
            return value
        return mx.where(step < warmup, _mix(warmup_init, peak, ramp(mx.minimum(step / warmup, 1))), value)

    return schedule


def _mix(first: float, last: float, t: mx.array) -> mx.array:
    """A straight line from exactly ``first`` at t = 0 to exactly ``last`` at t = 1."""
    return first * (1 - t) + last * t


def _half_cosine(t: mx.array) -> mx.array:
    """From exactly 0 at t = 0 to exactly 1 at t = 1 and beyond. On some GPUs the cosine of pi is not exactly -1."""
    return mx.where(t < 1, (1 - mx.cos(math.pi * t)) / 2, 1.0)


def _decay_length(peak: float, steps: int, end: float, warmup: int) -> int:
    check_number("peak", peak)
    check_number("end", end)
    check_count("steps", steps, 1)
    check_count("warmup", warmup, 0)
    if warmup >= steps:
        raise InputError(f"warmup is {warmup}; it must be less than steps = {steps}, which include the warmup")
    return steps - warmup


def _log_rate(peak: float, decay_rate: float, end: float) -> float:
    check_number("peak", peak)
    check_number("end", end)
    _positive("decay_rate", decay_rate)
    if decay_rate > 1:
        raise InputError(f"decay_rate is {decay_rate!r}; it must be at most 1")
    return math.log(decay_rate)


def _positive(name: str, value: float) -> None:
    check_number(name, value)
    if value == 0:
        raise InputError(f"{name} is {value!r}; it must be greater than 0")


def check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise InputError(f"{name} is {value!r}; it must be a whole number of at least {least}")


# The functions that make a schedule from numbers, as the documentation orders them.
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    function.__name__: function
    for function in (
        *(constant, linear, cosine, polynomial, warmup_stable_decay),
        *(inverse_sqrt, exponential, step_decay, one_cycle),
    )
}
