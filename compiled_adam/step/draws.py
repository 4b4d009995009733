"""Notices random numbers that loss_fn draws from Python or NumPy. A trace would repeat the same numbers for ever.

Other threads may draw at the same time, such as a loader of batches. So the draws of this thread are watched: those of
Python by a profile function, which Python calls in this thread only, and those of ``numpy.random``, of which Python
tells a profile function nothing, by functions in the place of NumPy's. What both miss shows in the generators' states.
"""

from __future__ import annotations

import functools
import pickle
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from ..base import InputError
from .other_models import referred

Result = TypeVar("Result")
_PYTHON, _NUMPY = "Python's random", "numpy.random"
_GLOBAL: Any = random.random.__self__  # type: ignore[attr-defined]  # the generator behind the functions of `random`
_DRAWS = ("random", "getrandbits")  # all others call these
_seen: dict[int, set[str]] = {}  # each thread that traces: from what it has drawn


def without_draws(function: Callable[[], Result], loss_fn: Any) -> Result:
    """Returns ``function()``. Raises ValueError if it has drawn from Python or NumPy.

    These are the global generators, and others to which ``loss_fn`` refers. If a global generator has changed without a
    draw that was seen, it is an error when there are no other threads, else a warning.
    """
    shared, own = _global_states(), _own_states(loss_fn)
    with _watched() as drawn:
        result = function()
    drawn |= {now[0] for key, now in _own_states(loss_fn).items() if own.get(key, now) != now}
    changed = {name for name, state in _global_states().items() if shared.get(name, state) != state}
    if found := sorted(drawn or changed):
        refused = (
            f"loss_fn draws random numbers from {' and '.join(found)}, and its trace would repeat them in every step;"
            " draw from mx.random, or draw before the step and pass the numbers in the batch as an array"
        )
        if drawn or threading.active_count() == 1:
            raise InputError(refused)
        warnings.warn(f"unless another thread has drawn just now, {refused}", stacklevel=2)
    return result


@contextmanager
def _watched() -> Iterator[set[str]]:
    """The global generators from which this thread draws meanwhile. A profiler that runs already stays undisturbed."""
    thread, numpy = threading.get_ident(), sys.modules.get("numpy.random")  # a step needs no NumPy
    drawn = _seen[thread] = set()
    methods = _methods(numpy) if numpy else {}
    try:
        if numpy:
            vars(numpy).update({name: watching for name, (_, watching) in methods.items()})
        if sys.getprofile() is None:
            sys.setprofile(_profile)
        yield drawn
    finally:
        if sys.getprofile() is _profile:  # also if it is left from a call in which Ctrl-C came just here
            sys.setprofile(None)
        _seen.pop(thread, None)
        if numpy and not _seen:
            vars(numpy).update({name: method for name, (method, _) in methods.items()})


def _profile(frame: FrameType, event: str, called: Any) -> None:
    if event == "c_call" and getattr(called, "__self__", None) is _GLOBAL and called.__name__ in _DRAWS:
        _saw(_PYTHON)


def _saw(name: str) -> None:
    _seen.get(threading.get_ident(), set()).add(name)


@functools.cache
def _methods(numpy: Any) -> dict[str, tuple[Any, Any]]:
    """The functions of ``numpy.random`` whose results differ from call to call, each with one that watches it."""
    shared = numpy.mtrand._rand
    found = {name: each for name, each in vars(numpy).items() if getattr(each, "__self__", None) is shared}
    methods = {name: (method, _watching(method)) for name, method in found.items() if name != "get_state"}
    return methods | {"default_rng": (numpy.default_rng, _watching_seeds(numpy.default_rng))}


def _watching(method: Callable[..., Any]) -> Callable[..., Any]:
    def draw(*args: Any, **kwargs: Any) -> Any:
        _saw(_NUMPY)
        return method(*args, **kwargs)

    return draw


def _watching_seeds(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def made(seed: Any = None) -> Any:
        if seed is None:  # else it draws the same numbers in every call of a plain loop, too
            _saw(f"{_NUMPY}.default_rng()")
        return make(seed)

    return made


def _global_states() -> dict[str, Any]:
    """The states of the global generators of Python and, if it is imported, of NumPy."""
    numpy = sys.modules.get("numpy.random")
    return {_PYTHON: random.getstate()} | ({_NUMPY: _state(numpy.mtrand._rand)} if numpy else {})


def _own_states(loss_fn: Any) -> dict[int, tuple[str, Any]]:
    """The states of other generators to which ``loss_fn`` refers, by identity.

    ``from numpy.random import rand`` refers to the global generator, too, and is not watched.
    """
    numpy = sys.modules.get("numpy.random")
    kinds = random.Random, *((numpy.Generator, numpy.RandomState) if numpy else ())
    shared = numpy and numpy.mtrand._rand
    return {
        id(each): (_NUMPY if each is shared else f"its {type(each).__name__}", _state(each))
        for each in referred(loss_fn, kinds)
        if each is not _GLOBAL
    }


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return None if isinstance(generator, random.SystemRandom) else generator.getstate()
    state = generator.get_state(legacy=False) if hasattr(generator, "get_state") else generator.bit_generator.state
    return pickle.dumps(state)  # as bytes, which can be compared
