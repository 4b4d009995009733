"""Notices random numbers that loss_fn draws from Python or NumPy. A trace would repeat the same numbers for ever."""

from __future__ import annotations

import pickle
import random
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from ..base import InputError

Result = TypeVar("Result")


def without_draws(function: Callable[[], Result]) -> Result:
    """Returns ``function()``. Raises ValueError if it has drawn from the global generator of Python or NumPy.

    If there are other threads, one of them may have drawn, so a warning says so instead.
    """
    before = _states()
    result = function()
    after = _states()
    if drawn := [name for name, state in before.items() if after.get(name) != state]:
        refused = (
            f"loss_fn draws random numbers from {' and '.join(drawn)}, and its trace would repeat them in every step;"
            " draw from mx.random, or draw before the step and pass the numbers in the batch as an array"
        )
        if threading.active_count() == 1:
            raise InputError(refused)
        warnings.warn(f"unless another thread has drawn just now, {refused}", stacklevel=2)
    return result


def _states() -> dict[str, Any]:
    """The states of the global generators of Python and, if it is imported, of NumPy."""
    states: dict[str, Any] = {"Python's random": random.getstate()}
    if (numpy := sys.modules.get("numpy.random")) is not None:  # a step needs no NumPy
        states["numpy.random"] = pickle.dumps(numpy.get_state(legacy=False))  # as bytes, which can be compared
    return states
