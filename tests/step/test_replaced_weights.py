"""Weights that a caller replaces between two steps: residuals and moments of the old ones must not act on them."""

from __future__ import annotations

from collections.abc import Callable

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from compiled_adam.update import SMALL, residual
from nets import assert_same

from tests.small_steps import loss_fn


@pytest.mark.parametrize("size", [8, SMALL + 2])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("many", [False, True])
def test_a_replaced_weight_starts_with_residual_zero(size: int, dtype: mx.Dtype, many: bool) -> None:
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = mx.random.normal((size,), key=mx.random.key(1)).astype(dtype)
            self.b = mx.random.normal((size,), key=mx.random.key(2)).astype(dtype)

    model, adam = Weights(), ca.AdamW(1e-3, weight_decay=0.0)
    optimizer = optim.MultiOptimizer([adam, optim.SGD(0.0)], [lambda path, p: True]) if many else adam
    step = ca.make_step(model, lambda m, x: ((m.a + m.b) * x).sum().astype(mx.float32), optimizer)
    for i in range(3):
        step(mx.array(0.5 + i))
    zero = residual.zeros(model.a)[0].item()
    rests = np.array(adam.state["a"]["residual"])
    assert (rests != zero).mean() > 0.9
    edits: dict[str, Callable[[], None]] = {
        "another array": lambda: setattr(model, "a", mx.where(mx.arange(size) % 2 == 0, mx.zeros((), dtype), model.a)),
        "in place": lambda: model.a.__setitem__(slice(None, None, 2), 1.0),
    }
    adam.learning_rate = 0.0  # the update itself changes nothing then
    for edit in edits.values():
        edit()
        weights = np.array(model.a.astype(mx.float32))
        step(mx.array(0.5))
        rests_now = np.array(adam.state["a"]["residual"])
        assert (rests_now[::2] == zero).all()
        assert np.array_equal(rests_now[1::2], rests[1::2])  # of those that nobody has touched
        assert np.array_equal(np.array(model.a.astype(mx.float32)), weights)
    untouched = np.array(adam.state["b"]["residual"])
    mx.eval(nn.value_and_grad(model, lambda m: m.a.sum().astype(mx.float32))(model))  # puts copies in their place
    step(mx.array(0.5))
    assert np.array_equal(np.array(adam.state["b"]["residual"]), untouched)


@pytest.mark.parametrize("size", [8, SMALL + 2])
def test_a_weight_that_is_replaced_with_its_residual_keeps_both(size: int) -> None:
    model, adam = nn.Linear(size, 1, bias=False), ca.AdamW(1e-3, weight_decay=0.0)
    model.set_dtype(mx.bfloat16)
    step = ca.make_step(model, loss_fn, adam)
    x = mx.ones((2, size), mx.bfloat16)
    step(x)
    weight, rest = model.weight.tolist(), adam.state["weight"]["residual"].tolist()
    step(x)
    model.weight, adam.state["weight"]["residual"] = mx.array(weight, mx.bfloat16), mx.array(rest, mx.int16)
    adam.learning_rate = 0.0
    step(x)
    assert (model.weight.tolist(), adam.state["weight"]["residual"].tolist()) == (weight, rest)


@pytest.mark.parametrize("size", [8, SMALL + 2])
@pytest.mark.parametrize("many", [False, True])
def test_what_is_saved_after_weights_were_replaced_goes_on_like_the_step(size: int, many: bool) -> None:
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = mx.random.normal((size,), key=mx.random.key(1)).astype(mx.bfloat16)
            self.b = mx.random.normal((size,), key=mx.random.key(2)).astype(mx.bfloat16)

    def make() -> ca.TrainStep:
        adam: optim.Optimizer = ca.AdamW(1e-4)
        if many:
            adam = optim.MultiOptimizer([adam, optim.SGD(0.1)], [lambda path, p: True])
        return ca.make_step(Weights(), lambda m, x: ((m.a + m.b) * x).sum().astype(mx.float32), adam)

    step, fresh = make(), make()
    for i in range(3):
        step(mx.array(0.5 + i))
    step.model.a = step.model.a[::-1]
    step.model.b[:4] = 0.25
    fresh.load_state_dict(step.state_dict())
    for each in (step, fresh):
        each(mx.array(0.5))
    expected = step.state_dict()
    for part, arrays in fresh.state_dict().items():
        for path, array in arrays.items():
            assert mx.array_equal(array, expected[part][path]).item(), path


def test_running_statistics_belong_to_a_state_from_before_the_first_step() -> None:
    def make() -> nn.Module:
        mx.random.seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3), nn.Linear(3, 1))

    trained = make()
    step = ca.make_step(trained, loss_fn, ca.AdamW(1e-2))
    for i in range(3):
        step(mx.random.normal((8, 4), key=mx.random.key(i)))
    before = ca.make_step(trained, loss_fn, ca.AdamW(1e-2)).state_dict()
    fresh = ca.make_step(make(), loss_fn, ca.AdamW(1e-2))
    fresh.load_state_dict(before)
    assert_same(fresh.model, trained, 0.0)


def test_a_loaded_state_keeps_its_residuals() -> None:
    model = nn.Linear(300, 300)
    model.set_dtype(mx.bfloat16)
    step = ca.make_step(model, loss_fn, ca.AdamW(1e-3))
    x = mx.ones((2, 300), mx.bfloat16)
    step(x)
    kept = step.state_dict()
    step(x)
    expected = step.state_dict()
    step.load_state_dict(kept)
    step(x)
    for path, array in step.state_dict()["optimizer"].items():
        assert mx.array_equal(array, expected["optimizer"][path]).item(), path
