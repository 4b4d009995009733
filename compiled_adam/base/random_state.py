"""MLX's global random state. Python can read it, but only ``mx.random.seed`` and ``mx.compile`` can assign it."""

from __future__ import annotations

from collections.abc import Callable
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
