"""Small steps and their comparison with plain MLX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn


def loss_fn(model: nn.Module, x: mx.array) -> mx.array:
    return mx.square(model(x) - 1).mean()


def trained(make: Callable[[], nn.Module], optimizer: Callable[[], Any], with_step: bool, calls: int = 4) -> nn.Module:
    """A model after some updates by a step, or by MLX's own loop."""
    mx.random.seed(0)
    model, its = make(), optimizer()
    step = ca.make_step(model, loss_fn, its) if with_step else None
    for i in range(calls):
        x = mx.random.normal((3, 4), key=mx.random.key(i))
        if step is None:
            its.update(model, nn.value_and_grad(model, loss_fn)(model, x)[1])
            mx.eval(model.parameters(), its.state)
        else:
            step(x)
    return model
