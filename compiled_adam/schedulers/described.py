"""Schedules that say what they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import mlx.core as mx

from ..base import shown

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
