"""Ctrl-C at any bytecode of a called `Compensated.update` leaves model and state of before the call, or of after it."""

from __future__ import annotations

import random
from collections.abc import Callable

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from tests.interrupts import bytecodes, interrupted
from tests.nets import linear_net, squared_error

OPTIMIZERS: dict[str, Callable[[], optim.Optimizer]] = {
    "SGD": lambda: optim.SGD(optim.linear_schedule(1e-2, 1e-3, 10), momentum=0.9),
    "Adafactor": lambda: optim.Adafactor(1e-2),  # a matrix has two arrays
    "MultiOptimizer": lambda: optim.MultiOptimizer([optim.Muon(1e-2), optim.AdamW(1e-2)], [lambda _, p: p.ndim > 1]),
}


def model_and_gradients() -> tuple[nn.Module, dict]:
    model = linear_net()
    model.set_dtype(mx.bfloat16)
    x = mx.random.normal((8, 4), key=mx.random.key(0)).astype(mx.bfloat16)
    return model, nn.value_and_grad(model, squared_error)(model, x, x.sum(axis=1, keepdims=True))[1]


def contents(model: nn.Module, optimizer: ca.Compensated) -> dict[str, bytes]:
    arrays = tree_flatten({"model": model.parameters(), "state": optimizer.state})
    return {path: bytes(memoryview(array.reshape(-1).view(mx.uint8))) for path, array in arrays}


@pytest.mark.parametrize("kind", ["later", "first", "traced"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_called_update_is_made_or_not_made(name: str, kind: str) -> None:
    compiled = None

    def fresh() -> tuple[nn.Module, ca.Compensated]:
        model, optimizer = model_and_gradients()[0], ca.Compensated(OPTIMIZERS[name](), max_grad_norm=0.1)
        if kind == "later":
            optimizer.init(model.trainable_parameters())
        if kind != "traced" and compiled is not None:
            optimizer._compiled = compiled
        return model, optimizer

    gradients = model_and_gradients()[1]
    mx.eval(gradients)
    model, optimizer = fresh()
    states = [contents(model, optimizer)]
    optimizer.init(model.trainable_parameters())  # the state that a first update makes is zeros: nothing is lost
    states.append(contents(model, optimizer))
    for _ in range(2):
        optimizer.update(model, gradients)
        states.append(contents(model, optimizer))
    compiled = optimizer._compiled
    model, optimizer = fresh()
    total = bytecodes(lambda: optimizer.update(model, gradients))
    chosen = random.Random(0)
    positions = [chosen.randrange(1, total) for _ in range(25 if kind == "traced" else 50)]
    outcomes = set()
    for position in [*positions, *range(total - (20 if kind == "traced" else 80), total + 1)]:
        model, optimizer = fresh()
        interrupted(lambda: optimizer.update(model, gradients), position)  # noqa: B023
        found = states.index(contents(model, optimizer))  # ValueError: neither
        outcomes.add(found)
        optimizer.update(model, gradients)
        assert contents(model, optimizer) == states[3 if found == 2 else 2], position
    assert outcomes == ({0, 2} if kind == "later" else {0, 1, 2})
