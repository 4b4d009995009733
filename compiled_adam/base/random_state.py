"""MLX's global random state. Python can read it, but only ``mx.random.seed`` and ``mx.compile`` can assign it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import mlx.core as mx


def get() -> mx.array:
    """The key: two uint32."""
    state: Any = mx.random.state
    return state[0]


def assign(key: mx.array) -> None:
    """Makes ``key`` the state: the random numbers that followed when it was read now follow again."""
    assignment(key)()


def assignment(key: mx.array) -> Callable[[], None]:
    """``assign(key)`` as a function without arguments that is written in C, for `call_all`."""
    high, low = cast(list[int], key.tolist())
    return partial(mx.random.seed, high << 32 | low)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``mx.compile``, with the random state as an input and an output."""
    return mx.compile(function, inputs=[mx.random.state], outputs=[mx.random.state])


@contextmanager
def repeated(key: mx.array) -> Iterator[None]:
    """Inside the block come the random numbers that followed when ``key`` was the state; then the state is as before.

    Also while a function is traced, where ``key`` has no value, so that `assign` could not read it.
    """
    before = get()
    _assign_traced(key)
    try:
        yield
    finally:
        _assign_traced(before)


class _State(list[Any]):
    """The random state for `_assign_traced`: MLX reads captured outputs by iteration, and assigns them by index."""

    def __init__(self) -> None:
        super().__init__([mx.random.state])
        self.read: list[mx.array] = []

    def __iter__(self) -> Iterator[mx.array]:
        return iter(self.read)


def _assign_traced(key: mx.array) -> None:
    state = _State()
    mx.compile(state.read.append, outputs=state)(key)
