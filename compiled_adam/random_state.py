"""MLX's global random state, which Python can read but only ``mx.random.seed`` and ``mx.compile`` can assign."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx


def get() -> mx.array:
    """The key: two uint32."""
    return mx.random.state[0]  # type: ignore[index]


def assign(key: mx.array) -> None:
    """Makes ``key`` the state: random numbers from here on are those that followed when it was read."""
    high, low = cast(list[int], key.tolist())
    mx.random.seed(high << 32 | low)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``mx.compile``, with the random state as an input and an output."""
    return mx.compile(function, inputs=[mx.random.state], outputs=[mx.random.state])


@contextmanager
def kept_on_error() -> Iterator[None]:
    """A trace that ends early leaves a placeholder in the random state; this puts back what was there."""
    key = get()
    try:
        yield
    except BaseException:
        if get() is not key:
            assign(key)
        raise
